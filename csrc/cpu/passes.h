// The CPU backend's passes over one tile of the vocabulary: the interface that Python calls, for every instruction set.
// Matrices are row-major with unit column stride. Row strides are in elements.
#pragma once

#include <cstdint>

namespace dadpo {

// Columns per group. A tile is processed group by group: the logits of a group stay in the L2 cache, and a retained row
// stores one base per group.
constexpr long kGroup = 192;

// The arguments that all passes share. hidden and weight are bfloat16 if `bf16`, otherwise float32.
struct Tile {
    const void* hidden;  // [rows, width]
    long rows, width, hidden_stride;
    const void* weight;  // [columns, width], the tile's rows of the weight
    long weight_stride;
    const float* bias;  // [columns] or null
    long first, columns;  // the tile is [first, first + columns) of the vocabulary
    const int32_t* ids;  // [rows, entries], ascending along a row: the label and the top-k ids
    const uint8_t* in_topk;  // [rows, entries] bool: the id is a top-k id
    long entries;  // per row
    float scale, softcap, inv_temperature;  // softcap 0: no softcap
    bool bf16;
    int threads;
};

// Retained exponentials exp(z - base), times the softcap's derivative.
struct Retained {
    void* exps;  // [rows, columns rounded up to kGroup], type of hidden; null: not retained
    float* bases;  // [rows, groups]
};

struct Statistics {
    float* max;  // [rows] updated: the running softmax state of the columns outside the row's top-k ids
    double* sum;  // [rows] updated; the live pass writes both
    float* selected;  // [rows, entries] written: logits of the ids that lie in this tile
};

struct Gradient {
    const float* coefficient;  // [rows] c: dz_j = c exp(z_j - base) outside the entries
    const float* base;  // [rows] the largest logit of the tail
    const float* values;  // [rows, entries] dz at the ids, equal for duplicates
    float* hidden;  // [rows, padded width] accumulated, or null
    void* weight;  // [columns, width] written, type of hidden, or null
    long weight_stride;
    float* bias;  // [columns] written, or null
};

struct Candidates {
    float* max;  // [rows] updated: the running softmax state of the columns that are not candidates
    double* sum;  // [rows] updated
    float* values;  // [rows, capacity] updated: candidates so far
    int32_t* ids;  // [rows, capacity] updated
    int32_t* counts;  // [rows] updated: number of candidates
    long k, capacity;
};

// A chunk of tokens over the whole vocabulary, for the live plan: see live.h.
struct LiveChunk {
    float* exps;  // [columns, rows], columns of the vocabulary by tokens
    long columns, rows;
    int threads;
};

// The backward of the live plan for a chunk of tokens and the live columns of one tile: see live_gradient.h.
struct LiveGradient {
    const void* dz;  // [columns, rows padded to whole units] operand type, readable for one vector past its end
    const int64_t* live;  // [columns] ids of the live columns, ascending
    long columns, rows;
    const void* hidden;  // [rows, width]
    long hidden_stride;
    const void* weight;  // [vocabulary, width]
    long weight_stride, width;
    float* grad_hidden;  // [rows, padded width] accumulated, or null
    long grad_hidden_stride;
    float* grad_weight;  // [tile's columns, width] accumulated, or null
    long grad_weight_stride;
    long first;  // the tile's first id
    bool bf16;
    int threads;
};

// The passes compiled for one instruction set. `workspace` has the size that `workspace_bytes` returns (of a live pass,
// `live_workspace_bytes`) and is 64-byte aligned. The parameters of live_* are described in live.h.
struct Passes {
    const char* name;
    long panel;  // the width is padded to a multiple of this in `Gradient::hidden` and in the packed hidden states
    bool multiplies_bf16;  // bfloat16 operands; otherwise bfloat16 is widened and packed hidden states are float32
    long (*workspace_bytes)(const Tile&, bool logits, bool grad_hidden, bool keep_dz);
    void (*pack_hidden)(const Tile&, uint32_t* out);  // B of dz^T hidden: packed once per backward, read by every tile
    void (*forward)(const Tile&, const Statistics&, const Retained&, char* workspace);
    void (*backward)(const Tile&, const Gradient&, const Retained&, const uint32_t* packed_hidden, char* workspace);
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
