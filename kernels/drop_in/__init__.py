"""Other libraries' names, signatures and values, computed by this package.

| module             | stands in for                                                              |
|--------------------|----------------------------------------------------------------------------|
| `flash_attn`       | the `flash_attn_*func` of FlashAttention-2                                 |
| `liger`            | loss modules of Liger-Kernel                                               |
| `torch_functional` | losses and scaled_dot_product_attention of torch.nn.functional             |
| `transformers`     | an `attn_implementation` of Hugging Face transformers: call its `register` |
"""
