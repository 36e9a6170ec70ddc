// The CUDA kernels' entry points. All pointers are to memory of the current device, except those of the arguments
// themselves. `stream` is a cudaStream_t. `scratch` is device memory of the size that the function of that name gives; it
// is free again when the stream has come so far. Launches return at once; what the driver refuses is thrown as
// std::runtime_error, what the kernels cannot do as std::invalid_argument.
#pragma once

#include "../arguments.h"

namespace vitdiv::cuda {

int64_t attention_gram_fwd_scratch(const GramForward& args);  // bytes
void attention_gram_fwd(const GramForward& args, void* scratch, void* stream);
int64_t attention_gram_bwd_scratch(const GramBackward& args);
void attention_gram_bwd(const GramBackward& args, void* scratch, void* stream);
int64_t head_dots_scratch(const HeadDots& args);
void head_dots(const HeadDots& args, void* scratch, void* stream);

// The items of a set of vectors must be at equal distances in memory. `saved` has a layout of its own, the Triton kernels'
// (gpu_saved.py): a tensor of so many int32, or null when there will be no backward; it need not be initialised.
int64_t pairwise_cosine_saved_words(const CosineArgs& args);
int64_t pairwise_cosine_fwd_scratch(const CosineForward& args);
void pairwise_cosine_fwd(const CosineForward& args, void* scratch, void* stream);
int64_t pairwise_cosine_bwd_scratch(const CosineBackward& args);
void pairwise_cosine_bwd(const CosineBackward& args, void* scratch, void* stream);

// Nothing is saved.
int64_t pairwise_logsumexp_fwd_scratch(const LogSumExpForward& args);
void pairwise_logsumexp_fwd(const LogSumExpForward& args, void* scratch, void* stream);
int64_t pairwise_logsumexp_bwd_scratch(const LogSumExpBackward& args);
void pairwise_logsumexp_bwd(const LogSumExpBackward& args, void* scratch, void* stream);
int64_t pairwise_nearest_scratch(const NearestForward& args);
void pairwise_nearest(const NearestForward& args, void* scratch, void* stream);

int64_t two_gram_fwd_scratch(const TwoGramForward& args);
void two_gram_fwd(const TwoGramForward& args, void* scratch, void* stream);
int64_t two_gram_bwd_scratch(const TwoGramBackward& args);
void two_gram_bwd(const TwoGramBackward& args, void* scratch, void* stream);

int64_t reattention_fwd_scratch(const ReattentionForward& args);
void reattention_fwd(const ReattentionForward& args, void* scratch, void* stream);

int64_t reattention_bwd_scratch(const ReattentionBackward& args);
void reattention_bwd(const ReattentionBackward& args, void* scratch, void* stream);

}  // namespace vitdiv::cuda
