// The CUDA backend's passes over one tile of products in memory: the interface that Python calls. This header does not
// depend on CUDA.
//
// A tile is `hidden @ weight[first : first + columns].T` in float32, written by cuBLAS. Pointers are to device memory.
// Strides are between rows, in elements. Work is enqueued on the caller's stream; no pass synchronizes or allocates.
#pragma once

#include <cstdint>

namespace dadpo {
namespace cuda {

enum class Type { f32, bf16, f16 };  // dtype of retained exponentials and of the gradient of the logits

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
    int32_t segments;  // thread blocks per row
};

// The softmax state of each segment of each row. The pass that writes it says which columns it covers.
struct Partials {
    float* max;  // [segments, rows]
    float* sum;  // [segments, rows], of exponentials relative to the segment's maximum
};

// exp(z - base) times the softcap's derivative. In float16 also times 2^15, or values 17 nats below the base would
// underflow.
struct Retained {
    void* exps;  // [rows, columns] of `type`
    int64_t stride;
    Type type;
};

struct Statistics {
    Tile tile;
    const uint8_t* in_topk;  // [rows, entries], bool: the id is a top-k id
    float* selected;  // [rows, entries] written: logits of the ids that lie in this tile
    Partials partials;  // written: the columns outside the top-k ids
    Retained retained;  // written unless `exps` is null, with the row's maximum as base; requires segments == 1
};

struct Absorb {
    Partials partials;  // read
    int64_t rows;
    int32_t segments;
    float* max;  // [rows] updated: the running state
    double* sum;  // [rows] updated
    float* bases;  // [rows] written: the tile's maximum; or null
    int64_t bases_stride;
};

struct LogitGradient {
    Tile tile;
    const float* c;  // [rows]: dz_j = c exp(z_j - base) outside the entries; null: write retained exponentials instead
    const float* base;  // [rows]
    int64_t base_stride;
    const float* values;  // [rows, entries] dz at the entries, equal for duplicates; null: 0
    Retained out;  // [rows, columns] written
};

// Retained exponentials and what turns them into the gradient of the logits.
struct RetainedGradient {
    Retained retained;
    int64_t rows;
    int32_t first, columns;
    Entries entries;
    const float* c;  // [rows], as in LogitGradient
    const float* base;  // [rows]
    const float* values;  // [rows, entries]
    const float* bases;  // [rows] that the exponentials are relative to
    int64_t bases_stride;
    void* dz;  // [rows, columns] of the exponentials' type, written by `scale_retained`
    int64_t dz_stride;
    float* factors;  // [rows] written by `enter_values`: dz = factors * exps
    void* saved;  // [rows, entries] of the exponentials' type, written by `enter_values`: the exponentials it replaced
};

struct ColumnSums {
    Retained matrix;  // [rows, columns]
    int64_t rows;
    int32_t columns;
    const float* factors;  // [rows]; null: all 1
    float* out;  // [columns] written: sum over rows of factors * matrix
};

struct TopK {
    Tile tile;  // requires segments == 1
    float* selected;  // [rows, entries] written: logits of the ids that lie in this tile
    float* values;  // [rows, capacity] updated: the largest logits so far, in ascending order of ids
    int32_t* ids;  // [rows, capacity] updated
    int64_t capacity;  // row stride of `values` and `ids`
    int32_t have, keep;  // number of kept logits before and after this tile
    Partials partials;  // [1, rows] written: all logits that are not kept
};

int columns_per_segment();  // at most, in the registers of one thread block
int max_k();  // largest k that `topk` supports

void statistics(const Queue&, const Statistics&);
void absorb(const Queue&, const Absorb&);
void logit_gradient(const Queue&, const LogitGradient&);
void scale_retained(const Queue&, const RetainedGradient&);  // dz = c exp(bases - base) exps, `values` at the entries
void enter_values(const Queue&, const RetainedGradient&);  // edits exps so that factors * exps is dz
void restore(const Queue&, const RetainedGradient&);  // undoes enter_values
void column_sums(const Queue&, const ColumnSums&);
void topk(const Queue&, const TopK&);

}  // namespace cuda
}  // namespace dadpo
