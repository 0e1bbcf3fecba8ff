// The CUDA backend's passes over one tile of products in memory: the interface that Python calls. This header does not
// depend on CUDA.
//
// A tile is `hidden @ weight[first : first + columns].T` in float32, written by cuBLAS. Pointers are to device memory.
// Strides are between rows, in elements. Work is enqueued on the caller's stream; no pass synchronizes or allocates.
#pragma once

#include <cstdint>

namespace dadpo {
namespace cuda {

enum class Type { f32, bf16, f16 };

struct Queue {
    int device;
    void* stream;  // cudaStream_t
};

// Each row's label and top-k ids.
struct Entries {
    const int32_t* ids;  // [rows, count], ascending along a row; duplicates are adjacent
    int32_t count;
};

struct Tile {
    const float* products;  // [rows, columns], any alignment; rows aligned to 16 bytes get vector loads
    int64_t rows, stride;
    int32_t first, columns;  // the tile is [first, first + columns) of the vocabulary
    const float* bias;  // [columns] or null
    float scale, softcap, inv_temperature;  // softcap 0: no softcap
    Entries entries;
};

// The running softmax state of each row. The pass that updates it says which columns it covers.
struct State {
    float* max;  // [rows] the largest logit
    double* sum;  // [rows] of exponentials relative to it
};

struct Matrix {
    void* data;  // [rows, columns] of `type`
    int64_t stride;
    Type type;
};

struct Forward {
    Tile tile;
    const uint8_t* in_topk;  // [rows, entries], bool: the id is a top-k id
    float* selected;  // [rows, entries] written: logits of the ids that lie in this tile
    State state;  // updated by the columns outside the top-k ids
    Matrix exps;  // [rows, >= first + columns] written from column `first` on: exp(z - base) times the softcap's slope
    float* bases;  // [rows] updated: the largest logit of the first tile that has any, unless a later one ...
    float reach;  // ... rises above it by more than this: then that one, and the row's exponentials so far follow
};

struct LogitGradient {
    Tile tile;
    const float* c;  // [rows]: dz_j = c exp(z_j - base) times the softcap's slope outside the entries
    const float* base;  // [rows]
    const float* values;  // [rows, entries] dz at the entries, equal for duplicates
    Matrix dz;  // [rows, columns] written
};

struct Exchange {
    Matrix matrix;  // [rows, columns] edited in place
    int64_t rows;
    int32_t columns;
    Entries entries;
    void* values;  // [rows, entries] of the matrix's type, edited in place
};

struct ColumnSums {
    Matrix matrix;  // [rows, columns]
    int64_t rows;
    int32_t columns;
    const float* factors;  // [rows]; null: all 1
    float* out;  // [columns] written: sum over rows of factors * matrix
};

struct TopK {
    Tile tile;
    float* selected;  // [rows, entries] written: logits of the ids that lie in this tile
    float* values;  // [rows, capacity] updated: the largest logits so far, in ascending order of ids
    int32_t* ids;  // [rows, capacity] updated
    int64_t capacity;  // row stride of `values` and `ids`
    int32_t have, keep;  // number of kept logits before and after this tile
    State state;  // updated by all logits that are not kept
};

int max_columns();  // of a tile: a row lies in the registers of one thread block
int max_k();  // largest k that `topk` supports

void forward(const Queue&, const Forward&);
void logit_gradient(const Queue&, const LogitGradient&);
void exchange(const Queue&, const Exchange&);  // swaps the matrix at the ids below `columns` with the values
void column_sums(const Queue&, const ColumnSums&);
void topk(const Queue&, const TopK&);

}  // namespace cuda
}  // namespace dadpo
