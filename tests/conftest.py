"""What holds for every test: nothing of the user's is read, nothing outside is reached.

Set before any library is imported, because huggingface_hub reads its environment at import.
"""

import os
import tempfile

from hypothesis import settings

_home = tempfile.TemporaryDirectory(prefix="mlx-onevision-tests-")
for _name in [name for name in os.environ if name.startswith("HF_")]:
    del os.environ[_name]
os.environ["HF_HOME"] = _home.name
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # a closed port
# Float32 is float32: a GPU that rounds its products to TF32 would miss the bounds of the tests.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# The same examples every time, and no deadline: a shared machine has slow moments.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")
