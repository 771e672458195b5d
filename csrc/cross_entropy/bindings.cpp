#include <pybind11/pybind11.h>

#include "bindings.h"
#include "cross_entropy/cross_entropy.h"

namespace hotloop {
namespace {

using Pointer = std::uintptr_t;  // 0: none

template <class T>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

void rows(Pointer logits, int64_t logits_stride, int dtype, int64_t n, int64_t v, Pointer target, Pointer weight,
          float weight_sum, Pointer token_weight, int64_t ignore_index, float label_smoothing, float z_loss,
          float softcap, float logit_scale, Pointer loss, Pointer nll, Pointer lse, Pointer entropy, Pointer predicted,
          Pointer out, int64_t out_stride, Pointer dloss, int64_t dloss_stride, int threads) {
  const Rows a = {n, v, DType(dtype), at<const void>(logits), logits_stride, at<const int64_t>(target),
                  at<const float>(weight), at<const float>(token_weight),
                  {ignore_index, label_smoothing, z_loss, softcap, logit_scale}, weight_sum, at<float>(loss),
                  at<float>(nll), at<float>(lse), at<float>(entropy), at<int64_t>(predicted), at<void>(out), out_stride,
                  at<const float>(dloss), dloss_stride};
  pybind11::gil_scoped_release free;
  cross_entropy_rows(a, threads);
}

void columns(Pointer logits, int64_t logits_stride, int dtype, int64_t n, int64_t width, int64_t first, Pointer target,
             Pointer a, Pointer b, Pointer c, Pointer dentropy, Pointer weight, Pointer lse, Pointer entropy,
             int64_t ignore_index, float softcap, float logit_scale, int threads) {
  const Columns all = {n, width, first, DType(dtype), at<void>(logits), logits_stride, at<const int64_t>(target),
                       at<const float>(a), at<const float>(b), at<const float>(c), at<const float>(dentropy),
                       at<const float>(weight), at<const float>(lse), at<const float>(entropy),
                       {ignore_index, 0, 0, softcap, logit_scale}};
  pybind11::gil_scoped_release free;
  cross_entropy_columns(all, threads);
}

}  // namespace

void bind_cross_entropy(pybind11::module_& m) {
  m.def("cross_entropy_rows", &rows, "See csrc/cross_entropy/cross_entropy.h: Rows.");
  m.def("cross_entropy_columns", &columns, "See csrc/cross_entropy/cross_entropy.h: Columns.");
}

}  // namespace hotloop
