"""Other libraries' names, signatures and values, computed by this package.

| module             | stands in for                                                              |
|--------------------|----------------------------------------------------------------------------|
| `flash_attn`       | the `flash_attn_*func` of FlashAttention-2                                 |
| `torch_functional` | `torch.nn.functional.scaled_dot_product_attention`                         |
| `transformers`     | an `attn_implementation` of Hugging Face transformers: call its `register` |

Those around the losses are in `hotloop.kernels.cross_entropy.dropin`.
"""
