"""What TensorFlow and Keras import only where it is installed is kept from them.

Python reads this file in pytest's workers and in the programs that tests start (conftest.py), which
may import all of it themselves. It took two fifths of the time of `import cbam_ops`.
"""

import sys
from importlib.abc import MetaPathFinder


class _Without(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("jax", "matplotlib", "pandas", "sklearn"):
            frame = sys._getframe(1)
            while "importlib" in frame.f_globals["__name__"]:
                frame = frame.f_back
            if frame.f_globals["__name__"].startswith(("keras.", "tensorflow.")):
                raise ModuleNotFoundError(f"{name} is left out (tests/lean)", name=name)
        return None


sys.meta_path.insert(0, _Without())
