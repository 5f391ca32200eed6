"""`longtake.models` needs torch alone until a function asks for more."""

import subprocess
import sys
import textwrap


def test_models_import_torch_alone() -> None:
    script = """
        import importlib, pkgutil, sys

        BLOCKED = {"diffusers", "transformers", "einops", "omegaconf", "hydra", "deepspeed",
                   "accelerate", "webdataset", "av", "decord", "wandb", "ftfy", "xxhash", "pyarrow"}

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in BLOCKED:
                    raise ImportError(f"{name} is blocked")
                return None

        sys.meta_path.insert(0, Block())
        import longtake.models

        names = [module.name for module in pkgutil.iter_modules(longtake.models.__path__)]
        for name in names:
            importlib.import_module(f"longtake.models.{name}")
        others = {n.split(".")[1] for n in sys.modules if n.startswith("longtake.")}
        assert others == {"models"}, others
        print(len(names))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 9
