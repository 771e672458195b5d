from hotloop.emulator.fixture import emulated

__all__ = ["emulated"]
