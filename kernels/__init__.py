"""Hand-written training kernels, one folder per op: `from hotloop.kernels.attention import attention`.

| folder          | public functions                                                                           |
|-----------------|--------------------------------------------------------------------------------------------|
| `cross_entropy` | `cross_entropy`, `linear_cross_entropy`, `linear_cross_entropy_stats`, `LinearCrossEntropy` |
| `attention`     | `attention`, `attention_varlen` and both `_with_lse`                                       |
| `optimizers`    | `AdamW`, `Lion`, `SGD`, `Muon`                                                             |

`hotloop.kernels.dispatch` chooses the backend of each call and explains the choice.
"""

if __name__ == "hotloop.kernels":
    __all__: list[str] = []
else:
    # The repository root is on sys.path, so that this folder answers to the bare name `kernels`. `transformers` probes
    # for packages by such names: raising here would break its import, and importing would register operators twice.
    __version__ = "0"

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"{name!r} was looked up in {__file__!r}, imported as {__name__!r}: "
            "this package is imported as hotloop.kernels (run `pip install -e .`, and start Python outside "
            "the repository's root or with -P)"
        )
