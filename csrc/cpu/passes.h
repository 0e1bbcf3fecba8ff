// The CPU backend's three passes over one tile of the vocabulary: what Python calls, for every instruction set.
#pragma once

#include <cstdint>

namespace dadpo {

// Columns of a tile are handled in groups of this many: a group's logits stay in the L2 cache, and a retained row keeps
// one base per group.
constexpr long kGroup = 192;

// What every pass needs to know. Matrices are row-major with unit column stride; `bf16` tells their type, else float32.
struct Tile {
    const void* hidden;  // [rows, width]
    long rows, width, hidden_stride;
    const void* weight;  // [columns, width], the tile's first row
    long weight_stride;
    const float* bias;  // [columns] or null
    long first, columns;  // the tile is [first, first + columns) of the vocabulary
    const int32_t* ids;  // [rows, entries], ascending along a row: the label and the top-k ids
    const uint8_t* in_topk;  // [rows, entries]
    long entries;
    float scale, softcap, inv_temperature;  // softcap 0: none
    bool bf16;
    int threads;
};

struct Retained {
    void* exps;  // [rows, columns rounded up to kGroup], the type of the operands; null: do not retain
    float* bases;  // [rows, groups]
};

struct Statistics {
    float* max;  // [rows] the running state of the columns outside the row's top-k ids
    double* sum;  // [rows]
    float* selected;  // [rows, entries] logits of the ids that lie in this tile
};

struct Gradient {
    const float* coefficient;  // [rows] c: dz_j = c exp(z_j - base) outside the entries
    const float* base;  // [rows] the largest logit of the tail
    const float* values;  // [rows, entries] dz at the ids; duplicates hold the same value
    float* hidden;  // [rows, padded width] accumulated, or null
    void* weight;  // [columns, width] written, the type of the operands, or null
    long weight_stride;
    float* bias;  // [columns] written, or null
};

struct Candidates {
    float* max;  // [rows] the running state of the columns that are no candidates
    double* sum;  // [rows]
    float* values;  // [rows, capacity] candidates so far
    int32_t* ids;  // [rows, capacity]
    int32_t* counts;  // [rows]
    long k, capacity;
};

// A chunk of tokens over the whole vocabulary, for the live plan: see live.h.
struct LiveChunk {
    float* exps;  // [columns, rows]
    long columns, rows;
    int threads;
};

// The backward of the live plan for a chunk of tokens and the live columns of one tile: see live_gradient.h.
struct LiveGradient {
    const void* dz;  // [columns, rows in whole units], the products' type, readable for a vector behind its end
    const int64_t* live;  // [columns] ascending ids
    long columns, rows;
    const void* hidden;  // [rows, width]
    long hidden_stride;
    const void* weight;  // [vocabulary, width]
    long weight_stride, width;
    float* grad_hidden;  // [rows, padded width] added to, or null
    long grad_hidden_stride;
    float* grad_weight;  // the tile's rows, added to, or null
    long grad_weight_stride;
    long first;  // the tile's first id
    bool bf16;
    int threads;
};

struct Passes {
    const char* name;
    long panel;  // columns are padded to a multiple of this in `Gradient::hidden` and in the packed hidden states
    bool multiplies_bf16;  // else bfloat16 is widened: packed hidden states are float32
    long (*workspace_bytes)(const Tile&, bool logits, bool grad_hidden, bool keep_dz);
    void (*pack_hidden)(const Tile&, uint32_t* out);  // B of dz^T hidden: once a pass, used by every tile
    void (*statistics)(const Tile&, const Statistics&, const Retained&, char* workspace);
    void (*gradient)(const Tile&, const Gradient&, const Retained&, const uint32_t* packed_hidden, char* workspace);
    void (*topk)(const Tile&, const Statistics&, const Candidates&, char* workspace);
    void (*live_exponentials)(const Tile&, const Statistics&, float* exps, float* bases);
    void (*live_columns)(const LiveChunk&, float* factors, const float* max, const float* share, float* sums,
                         float* energy, float* outside);
    void (*live_residuals)(const LiveChunk&, const float* factors, const uint8_t* dead, const float* profile,
                           float* out);
    long (*live_workspace_bytes)(const LiveGradient&);
    void (*live_gradient)(const LiveGradient&, char* workspace);
};

}  // namespace dadpo
