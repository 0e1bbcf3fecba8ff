// The CUDA backend's passes over one tile of products in memory: what Python calls. Nothing of CUDA in this header.
//
// A tile is `hidden @ weight[first : first + columns].T` in float32, as cuBLAS left it. Addresses are of device memory;
// everything is put in order on the caller's stream, and nothing waits or allocates.
#pragma once

#include <cstdint>

namespace dadpo {
namespace cuda {

enum class Type { f32, bf16, f16 };  // of retained exponentials and of the gradient of the logits

struct Queue {
    int device;
    void* stream;
};

// The ids of each row in ascending order, duplicates side by side: its label and its top-k ids.
struct Entries {
    const int32_t* ids;  // [rows, count]
    int32_t count;
};

struct Tile {
    const float* products;  // [rows, columns], any alignment; 16-byte accesses need rows that start at such an address
    int64_t rows, stride;
    int32_t first, columns;  // the tile is [first, first + columns) of the vocabulary
    const float* bias;  // [columns] or null
    float scale, softcap, inv_temperature;  // softcap 0: none
    Entries entries;
    int32_t segments;  // blocks that share a row
};

// The softmax state of each segment of each row, over the columns that count.
struct Partials {
    float* max;  // [segments, rows]
    float* sum;  // [segments, rows], from the segment's own maximum
};

// exp(z - base) times the softcap's slope (and 2^15 in float16, whose range would end 17 nats below the base).
struct Retained {
    void* exps;  // [rows, columns]
    int64_t stride;
    Type type;
};

struct Statistics {
    Tile tile;
    const uint8_t* in_topk;  // [rows, entries]
    float* selected;  // [rows, entries] written: logits of the ids that lie in this tile
    Partials partials;  // written: of the columns outside the top-k ids
    Retained retained;  // written with the row's maximum as base, if `exps` is not null; one segment only
};

struct Absorb {
    Partials partials;
    int64_t rows;
    int32_t segments;
    float* max;  // [rows] the running state
    double* sum;  // [rows]
    float* bases;  // [rows] written: the tile's maximum; or null
    int64_t bases_stride;
};

struct LogitGradient {
    Tile tile;
    const float* c;  // [rows]: dz_j = c exp(z_j - base) outside the entries. Null: 1, which makes retained exponentials
    const float* base;  // [rows]
    int64_t base_stride;
    const float* values;  // [rows, entries] dz at the entries, the same for duplicates; null: 0 there
    Retained out;  // written
};

// Retained exponentials as they lie in memory, and the gradient they shall become.
struct RetainedGradient {
    Retained retained;
    int64_t rows;
    int32_t first, columns;
    Entries entries;
    const float* c;  // [rows]
    const float* base;  // [rows]
    const float* values;  // [rows, entries]
    const float* bases;  // [rows] that the exponentials were taken from
    int64_t bases_stride;
    void* dz;  // `scale_retained` writes [rows, columns], of the exponentials' type
    int64_t dz_stride;
    float* factors;  // `enter_values` writes [rows]: dz = factors * exps
    void* saved;  // [rows, entries], of the exponentials' type: what stood there
};

struct ColumnSums {
    Retained matrix;
    int64_t rows;
    int32_t columns;
    const float* factors;  // [rows], null: 1
    float* out;  // [columns] written: sum over rows of factor * matrix
};

struct TopK {
    Tile tile;  // one segment
    float* selected;  // [rows, entries] written
    float* values;  // [rows, capacity]: the best so far in ascending order of ids
    int32_t* ids;  // [rows, capacity]
    int64_t capacity;
    int32_t have, keep;  // how many there are, and how many to keep of them and the tile
    Partials partials;  // written: of all that is not kept
};

int columns_per_segment();  // that a block can hold
int max_k();

void statistics(const Queue&, const Statistics&);
void absorb(const Queue&, const Absorb&);
void logit_gradient(const Queue&, const LogitGradient&);
void scale_retained(const Queue&, const RetainedGradient&);  // dz = c exp(bases - base) exps, and its values
void enter_values(const Queue&, const RetainedGradient&);  // in place, so that factors * exps is dz
void restore(const Queue&, const RetainedGradient&);  // undoes enter_values
void column_sums(const Queue&, const ColumnSums&);
void topk(const Queue&, const TopK&);

}  // namespace cuda
}  // namespace dadpo
