// Plain-old-data descriptions of what a kernel is to do. No torch, no CUDA: raw pointers and sizes,
// so that one build serves every torch version and the kernels can be tested without Python.
//
// Pointers are to contiguous row-major tensors. T is the number of steps, B the number of rows,
// H hidden units, R the width of h (R = H without projection), G gates (LSTM i,f,g,o; GRU r,z,n),
// N the total number of (step, row) pairs: T*B, or less when rows have different lengths.
#pragma once

#include <cstdint>

namespace rnnlm {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Which rows take part in which step. Dense: all rows in all steps. Packed: step t holds the first
// batch_sizes[t] rows (never increasing), and the steps lie one after the other in memory.
struct Sequence {
  int64_t steps;
  int64_t batch;
  const int64_t* batch_sizes;  // [T] or null for dense
  bool reverse;                // run from the last step to step 0
};

// The input projection, which the CPU kernels make themselves, some steps at a time, where gates_x
// is null. Where it is not, and for the CUDA kernels, it is made, and nothing here is read.
struct Projection {
  int64_t input;         // I
  const void* x;         // T [N, I]
  const void* w_ih;      // T [G*H, I]
  const void* b_ih;      // T [G*H] or null
  bool follows = false;  // x is the output of the problem before in the same call
};

// "T" in the comments below is the tensor dtype, "A" its arithmetic dtype (float32 for 16 bits).
struct LstmForward {
  DType dtype;
  int threads;
  Sequence seq;
  int64_t hidden, proj;  // proj = 0: no projection
  Projection projection;
  const void* gates_x;  // T [N, 4H], x W_ih^T + b_ih, or null: see Projection
  const void* w_hh;     // T [4H, R]
  const void* b_hh;     // T [4H] or null
  const void* w_hr;     // T [R, H], null without projection
  const void* h0;       // T [B, R]
  const void* c0;       // T [B, H]
  void* output;         // T [N, R]
  void* h_n;            // T [B, R]
  void* c_n;            // T [B, H]
  void* cells;          // A [N, H], or null: not wanted
  void* saved;          // T [N, 4H], or null: no backward will follow
};

struct LstmBackward {
  DType dtype;
  int threads;
  Sequence seq;
  int64_t hidden, proj;
  const void* grad_output;  // T [N, R] or null, as the next three
  const void* grad_h_n;     // T [B, R]
  const void* grad_c_n;     // T [B, H]
  const void* grad_cells;   // A [N, H]
  const void* w_hh;
  const void* w_hr;
  const void* c0;
  const void* cells;
  const void* saved;
  void* dgates;       // T [N, 4H]
  void* db;           // T [4H]: dgates summed over N, or null: not wanted. CUDA only
  void* dh0;          // T [B, R], null together with dc0: not wanted
  void* dc0;          // T [B, H]
  void* dproj;        // T [N, R]: gradient of each step's projected h; null without projection
  void* unprojected;  // T [N, H]: each step's h before the projection; null without projection
};

struct GruForward {
  DType dtype;
  int threads;
  Sequence seq;
  int64_t hidden;
  bool reset_before;
  Projection projection;
  const void* gates_x;  // T [N, 3H], x W_ih^T + b_ih, or null: see Projection
  const void* w_hh;     // T [3H, H]
  const void* b_hh;     // T [3H] or null
  const void* h0;       // T [B, H]
  void* output;         // T [N, H]
  void* h_n;            // T [B, H]
  void* saved;          // T [N, 4H] (reset after) or [N, 3H] (reset before), or null
};

struct GruBackward {
  DType dtype;
  int threads;
  Sequence seq;
  int64_t hidden;
  bool reset_before;
  const void* grad_output;  // T [N, H] or null
  const void* grad_h_n;     // T [B, H] or null
  const void* w_hh;
  const void* h0;
  const void* output;
  const void* saved;
  void* dgates;     // T [N, 3H]
  void* candidate;  // T [N, H]: reset after: gradient of W_hn h + b_hn; before: r * h
  // Reset after: T [4H], dgates and candidate summed over N; before: T [3H], dgates. Null: not
  // wanted. CUDA only.
  void* db;
  void* dh0;  // T [B, H], or null: not wanted
};

// out = x w^T, of a head that is followed by a cross-entropy. CPU only.
struct Linear {
  DType dtype;
  int threads;
  int64_t rows, input, units;
  const void* x;  // T [rows, input]
  const void* w;  // T [units, input]
  void* out;      // T [rows, units]
};

// What is left of the backward pass of a layer, LSTM or GRU, after its recurrence: sums over all
// rows of all steps. Or of a head, a linear map of x: one "gate", and nothing recurrent. Gradients
// that are null are not wanted. CPU only.
struct LayerGradients {
  DType dtype;
  int threads;
  Sequence seq;
  int64_t rows;  // N
  int64_t gates, hidden, proj, input;
  bool reset_before;
  double scale;             // that all gradients are multiplied by
  bool accumulates;         // dw_ih is added to
  const void* dgates;       // T [N, G*H]
  const void* candidate;    // T [N, H], of a GRU (see GruBackward)
  const void* dproj;        // T [N, R], with a projection (see LstmBackward), as the next
  const void* unprojected;  // T [N, H]
  const void* x;            // T [N, I]
  const void* h0;           // T [B, R]
  const void* output;       // T [N, R]
  const void* w_ih;
  void* dx;     // T [N, I]
  void* dw_ih;  // T [G*H, I]
  void* dw_hh;  // T [G*H, R]
  void* dw_hr;  // T [R, H]
  void* db_ih;  // T [G*H]
  void* db_hh;  // T [G*H]
};

// Logits of some rows of a linear + cross-entropy head (one chunk): their losses and, in place, the
// gradient of sum_i upstream_i loss_i with respect to them. V classes, A as above. With w the class
// weights and e = label_smoothing:
//   loss = (1 - e) w[target] (lse - x[target]) + e/V sum_c w[c] (lse - x[c]),  x = logits + bias
// A row whose target is ignore_index has loss 0 and gradient 0, whatever its logits.
struct CrossEntropy {
  DType dtype;
  int threads;
  int64_t rows, classes;     // N, V
  void* logits;              // T [N, V]; overwritten by the gradient where `gradient` is set
  const void* bias;          // T [V] or null
  const int64_t* target;     // [N], in [0, V) or ignore_index
  const void* class_weight;  // A [V] or null: all 1
  double class_weight_sum;   // sum of class_weight
  int64_t ignore_index;
  double label_smoothing;
  const void* upstream;  // A [N] or null: all 1
  bool gradient;         // otherwise only losses are wanted
  void* losses;          // A [N]
  void* bias_grad;       // A [V] or null; the gradient's column sums are added to it
};

// y = x * scale, or x * 0 with probability p: at position i, where the draw of stream 0 that the
// seed has for i (device/philox.h) is less than p.
struct Dropout {
  DType dtype;
  int threads;
  int64_t count;
  uint64_t seed;
  float p;
  double scale;
  const void* x;  // T [count]
  void* y;        // T [count]; may be x
};

// --- CUDA ----------------------------------------------------------------------------------------

// How the layer's steps are run on a GPU (docs/architecture.md). `automatic` lets the cost model
// choose; the others are refused where they cannot run the problem.
// `grid_pairs` is the grid tier with a forward pass whose CTAs gather in pairs.
enum class CudaTier : int {
  automatic = 0,
  stepwise = 1,
  block = 2,
  cluster = 3,
  grid = 4,
  grid_pairs = 5
};

// What a CUDA call needs beside the layer. In a CUDA call all pointers of the layer's struct are to
// device memory, except Sequence::batch_sizes, and `threads` is not used.
struct CudaCall {
  int device;
  std::uintptr_t stream;    // cudaStream_t; 0 is the default stream
  const int64_t* offsets;   // [T + 1] in device memory: first row of each step; null for dense
  void* workspace;          // device memory, aligned to 256 bytes
  int64_t workspace_bytes;  // at least what the plan asked for
  CudaTier tier;
  bool allow_tf32;     // float32 products may be rounded to TF32
  int concurrent = 1;  // launches like this one that share the device, itself included
  // Of a backward pass that wants db, A [P, 4H or 3H]: each group of CTAs that runs its own batch
  // rows (a grid plan's group, a cluster) writes its part of db to a row. Part of the workspace;
  // set by launch/layers.cu.
  void* bias_partials = nullptr;
};

}  // namespace rnnlm
