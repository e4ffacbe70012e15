"""The ops, one folder each; installed as `lmvae_fast.kernels`. Nothing is imported here: see docs/adding_an_op.md.

An op's folder becomes an attribute when it is first asked for: `lf.kernels.posterior.posterior_sample`.
"""


def __getattr__(name):
    import importlib

    # Found under its bare name from the repository root, where transformers probes for a package called so, it is inert.
    if __name__ != "kernels" and not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
