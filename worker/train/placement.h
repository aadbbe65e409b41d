// Placement: where a job's weights and activations are on a GPU, chosen so that the job fits the
// memory and takes the least time.
//
// A choice that is taken was planned on the plan device, so it fits exactly. Its time comes from a
// model of the step: operations over rates, bytes over bandwidths, and what the copies to the host
// take beyond the computation that they run beside.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/train/engine.h"

namespace attune {

// What a GPU model does in a long run, at its power limit. Measured with train_bench.
struct DeviceRates {
  double product_flops_per_s = 0;            // bf16 matrix products
  double fp8_product_flops_per_s = 0;        // products of 8-bit floats
  double attention_forward_flops_per_s = 0;  // causal, counting visible pairs only
  double attention_backward_flops_per_s = 0;
  double own_attention_backward_flops_per_s = 0;  // by our own kernels, not cuDNN
  double attention_extra_context = 0;             // keys whose time a query costs whatever it sees
  double adapter_flops_per_s = 0;    // of the passes over gradients, where they compute
  double memory_bytes_per_s = 0;     // read and written
  double host_copy_bytes_per_s = 0;  // pinned, one direction
  double layer_s = 0;  // of a layer, forward and backward, however few its tokens: starting its ops
};
// By the name that the driver gives; those of an H100 for one that was not measured.
DeviceRates RatesOf(const std::string& device_name);
// Of the opened device, with the rate of its own link to the host.
DeviceRates MeasureRates();

struct PlacementLimits {
  int64_t device_bytes = 0;
  int64_t host_bytes = 0;  // pinned, for this trainer
};

// Sets resident, activations and logits_bytes of `options` (a job on a CUDA device) and returns its
// memory. `mean_context`: keys that a query would see without the causal mask, on average; sets
// the cost of attention. RESOURCE_EXHAUSTED where nothing fits: with the least memory that the job
// needs and the micro-batch that would fit.
absl::StatusOr<v1::MemoryEstimate> ChoosePlacement(const PlacementLimits& limits,
                                                   const DeviceRates& rates, double mean_context,
                                                   EngineOptions* options);

// The time of one micro-batch, forward and backward, as placed. Without the optimiser.
double PredictMicroBatchSeconds(const EngineOptions& options, const DeviceRates& rates,
                                double mean_context);

}  // namespace attune
