"""`python -m hotloop.engine`, for launchers that want a module: `torchrun -m hotloop.engine pretrain RECIPE`."""

from hotloop.engine.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main())
