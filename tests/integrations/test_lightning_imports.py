"""Which Lightning the callback is of, and that nothing else of gradclip asks for one."""

import subprocess
import sys

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({names!r}))  # as if they were not installed
"""
TRAINING = """
import torch
from pytorch_lightning import LightningModule, Trainer
from gradclip.integrations.lightning import GradientClippingCallback

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch):
        return 100 * self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)

clipping = GradientClippingCallback(0.5)
trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, callbacks=[clipping])
trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(12, 4), batch_size=4))
print("steps", clipping.clippers[0].step, "norm", round(float(clipping.last.norm_post), 5))
"""
ALL = """
import importlib, pathlib, sys
import gradclip
root = pathlib.Path(gradclip.__file__).parent
names = [".".join(f.relative_to(root.parent).with_suffix("").parts) for f in root.rglob("*.py")]
for name in sorted(name.removesuffix(".__init__") for name in names):
    # RoboOrchardLab is not installed here; the package of integrations imports none of its own.
    if not name.startswith(("gradclip.integrations.lightning", "gradclip.integrations.robo")):
        importlib.import_module(name)
print(len(names) > 100, sorted(n for n in sys.modules if n in ("lightning", "pytorch_lightning")))
"""


def run(code, *missing):
    code = WITHOUT.format(names=list(missing)) + code
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_where_only_pytorch_lightning_is_installed_the_callback_is_one_of_that():
    done = run(TRAINING, "lightning")
    assert done.stdout.endswith("steps 3 norm 0.5\n"), done.stderr[-2000:]


def test_without_lightning_the_error_has_the_command():
    done = run("import gradclip.integrations.lightning", "lightning", "pytorch_lightning")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "gradclip.errors.MissingDependencyError: gradclip.integrations.lightning needs Lightning, "
        "which is not installed\n  pip install 'gradclip[lightning]'\n"
        "To read more: gradclip explain GC401\n"
    )


def test_nothing_else_imports_lightning():
    done = run(ALL)
    assert done.stdout == "True []\n", done.stderr[-2000:]
