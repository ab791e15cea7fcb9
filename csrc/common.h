// What every translation unit shares; plain C++17, no Python, no torch.
#pragma once

#include <cstdint>

namespace atp_fast {

using Index = std::int64_t;

constexpr Index divide_up(Index n, Index by) { return (n + by - 1) / by; }
constexpr Index round_up(Index n, Index step) { return divide_up(n, step) * step; }

enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// A tensor somebody else owns: address, element type, strides in elements (any sign, 0 when
// expanded).
struct View {
    void* data = nullptr;
    Dtype dtype = Dtype::float32;
    Index stride[5] = {0, 0, 0, 0, 0};
};

// Shapes and scoring of one attention call; the fields are those of Scoring in ops/reference.py.
struct AttentionShape {
    Index batch, heads, kv_heads, queries, keys, head_dim, value_dim;
    double scale;
    bool causal;
    Index window;                  // 0: none
    double softcap;                // 0: none
    const void* sinks;             // (heads,) in the accumulation type, or null
    const std::uint8_t* key_mask;  // (batch, keys), 0 on keys nobody may see, or null
};

// attention: q, k, v -> z (null when the wide one is enough) and the row statistics, which are
// contiguous in the accumulation type; every statistic but wide_z may be null together.
struct AttentionCall {
    AttentionShape shape;
    View q, k, v;
    View z;
    void* wide_z;
    void* logsumexp;
    std::int64_t* top_key;
    void* loo_logsumexp;
    void* loo_z;
};

// attention_vjp, key_patch_effects or both; outputs are contiguous, a null one is not computed.
struct BackwardCall {
    AttentionShape shape;
    Index cotangents;
    View q, k, v, k_corrupted, grad_z;
    const void* wide_z;
    const void* logsumexp;
    const std::int64_t* top_key;
    const void* loo_logsumexp;
    const void* loo_z;
    View grad_q, grad_k, grad_v;  // (cotangents, batch, heads, positions, dim), dtype of grad_z
    void* effect_k;               // (cotangents, batch, keys, kv_heads), accumulation type
};

constexpr int max_dims = 16;

// node_effects: leading dimensions outermost first, the summed axis apart; out is contiguous.
struct NodeEffectsCall {
    int dims;
    Index size[max_dims], delta_stride[max_dims], grad_stride[max_dims];
    Index width, delta_step, grad_step;  // the summed axis
    Index cotangents, grad_cotangent;
    const void *delta, *grad;
    Dtype delta_dtype, grad_dtype;
    const void* weights;  // (cotangents,) in the accumulation type, or null for signed effects
    void* out;
};

// add_effects: views are (cotangents, batch, positions, width, dim), the values without the first
// axis (its stride is not used); what is added to is of the accumulation type, its last axis
// contiguous.
struct AddEffectsCall {
    Index cotangents, batch, positions, width, dim, columns;
    View grad, clean, corrupted;  // values of null: grad holds the effects, dim is 1
    const void* weights;          // (cotangents,)
    const std::uint8_t* live;     // (batch, positions) or null: everywhere
    const std::int64_t* first;    // (batch,), the column of each first position, or null: 0
    void *score, *effect;         // (columns, width), effect or null
    Index score_row;
    void* per_pair;            // (pairs, columns, width) or null
    const std::int64_t* rows;  // (batch,) of per_pair
    Index pair_step, pair_row;
    bool pair_signed;  // a pair's row gets the first cotangent's effects, not the score
};

// norm, and norm_vjp where grad is given: views are (cotangents, sizes..., width), x and a
// forward's out without the first axis (its stride is not used); weight, bias, mean and rstd are of
// the accumulation type, bias null for none, mean null unless x is centred.
struct NormCall {
    Index cotangents, sizes[3], width;
    View x, grad, out;
    const void *weight, *bias;
    void *mean, *rstd;   // (rows,), written forward, read backward
    const void* before;  // backward: what is added, lies as out does and may be it; or null
    double eps, offset;
    bool rounded;
};

// rotate: x and out are (outer, batch, heads, positions, dim), cos and sin (batch, positions,
// rotated).
struct RotateCall {
    Index outer, batch, heads, positions, dim, rotated;
    View x, cos, sin, out;
    bool adjoint;
};

// gate_vjp: views are (cotangents, sizes..., width), gate and up without the first axis (its stride
// is not used).
struct GateCall {
    Index cotangents, sizes[3], width;
    View gate, up, grad, grad_gate, grad_up;
    bool gelu;  // its tanh form, else silu
};

// linear: y (rows, columns), contiguous, = x w + bias; bias is (columns,) or null, every type the
// accumulation type.
struct LinearCall {
    Index rows, columns, depth;
    const void* x;
    Index x_row;  // x's elements along the depth are neighbours
    const void* w;
    Index w_row, w_column;  // one of them 1
    const void* bias;
    void* y;
};

// The kernels of one instruction set; the first template argument of each is the accumulation type.
struct Kernels {
    const char* name;
    void (*attention[2])(const AttentionCall&, int threads);  // float, double
    void (*attention_backward[2])(const BackwardCall&, int threads);
    void (*node_effects[2])(const NodeEffectsCall&, int threads);
    void (*add_effects[2])(const AddEffectsCall&, int threads);
    void (*norm[2])(const NormCall&, int threads);
    void (*rotate[2])(const RotateCall&, int threads);
    void (*gate_vjp[2])(const GateCall&, int threads);
    void (*linear[2])(const LinearCall&, int threads);
    void (*exponential[2])(const void* in, void* out, Index count);
};

const Kernels* kernels_avx512();  // null where the build has none
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

// Runs body(context, unit, thread) for every unit in [0, units), units handed out in order.
void parallel(Index units, int threads, void (*body)(void*, Index, int), void* context);

// Asks for large pages behind a fresh output: a fault per 4 KiB costs a quarter of a large vjp's
// time.
void prefer_large_pages(void* data, Index bytes);

// Memory of one call: 64-byte aligned, freed at the end of the scope; throws std::bad_alloc.
class Scratch {
  public:
    explicit Scratch(Index bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    char* data() const { return data_; }

  private:
    char* data_;
};

}  // namespace atp_fast
