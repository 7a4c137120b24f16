"""A record of a run that never was: 28 layers, of which one explodes now and then.

PYTHONPATH=tests python tests/made_up_record.py runs/made-up [--steps 5000]
"""

import argparse
from pathlib import Path

import numpy as np

from gradclip.record.writer import Batch, Layout, Place, Writer

PARTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LAYERS = 33
EXPLODES = 17
"""The layer whose norm rises, and explodes in the clipped steps."""


def parameter_names():
    """Return 300 names."""
    inner = [f"model.layers.{at}.{part}.weight" for at in range(LAYERS) for part in PARTS]
    return ["model.embed_tokens.weight", *inner, "model.norm.weight", "lm_head.weight"]


def write_record(folder, steps=5000, seed=0):
    """Write the record, and return its norms (steps,) and whether each step was clipped."""
    random, names = np.random.default_rng(seed), parameter_names()
    at = np.arange(steps)
    limit = np.where(at < steps // 2, 1.0, 0.8)
    level = 0.15 * (1.6 + 5.2 * np.exp(-at / (0.03 * steps)) + 1.1 * np.cos(at / steps * 5))
    level *= np.exp(random.normal(0, 0.16, steps))
    usual = np.exp(random.normal(-1, 0.7, len(names)))
    usual /= np.linalg.norm(usual)
    loss = 2.0 + 8 * np.exp(-at / (0.1 * steps)) + random.exponential(0.03, steps)
    spikes = np.sort(random.choice(np.arange(20, steps), max(1, steps // 100), replace=False))
    skips = np.sort(random.choice(np.arange(5, steps), max(1, steps // 700), replace=False))
    height = np.zeros(steps)
    height[spikes] = np.exp(random.normal(1.7, 0.8, len(spikes)))
    broken = [at for at, name in enumerate(names) if ".16.self_attn.k" in name or ".17." in name]
    exploding = np.array([f"layers.{EXPLODES}." in name for name in names])
    rising = 1 + 2.5 * np.clip(at / steps - 0.6, 0, 1)
    totals, clipped = np.empty(steps), np.zeros(steps, bool)
    writer = Writer(Path(folder))
    number = writer.join()
    about = {
        "called": "GradientClipper",
        "kind": "AdamW",
        "policies": {"*": "NormClip(max_norm=1.0)"},
    }
    writer.begin(number, 0, Place(), about, resumes=False)
    sizes = [4096] * len(names)
    writer.lay_out(number, Layout(names, sizes, [2.0] * len(names), [1.0] * len(names)), 0)
    packed = np.empty(1, [("step", "<i8"), ("norms", "<f2", len(names))])
    for first in range(0, steps, 64):
        batch = Batch()
        for step in range(first, min(first + 64, steps)):
            norms = level[step] * usual * np.exp(random.normal(0, 0.25, len(names)))
            norms[exploding] *= rising[step] * (1 + 3 * height[step])
            norms *= 1 + 0.4 * height[step]
            is_broken = step in skips
            if is_broken:
                norms[broken] = np.nan
            total = float(np.linalg.norm(norms))
            coefficient = min(1.0, limit[step] / total) if not is_broken else 0.0
            clipped[step] = coefficient < 1 and not is_broken
            totals[step] = total
            entry = {
                "step": step,
                "loss": float(loss[step]),
                "lr": 3e-4 * min(1.0, (step + 1) / 200),
                "norm_pre": total,
                "threshold": float(limit[step]),
                "coefficient": coefficient,
                "clipped": bool(clipped[step]),
                "elapsed_ms": 210.0,
            }
            if is_broken:
                named = [names[each] for each in broken[:8]]
                entry |= {"skipped": True, "reason": "nonfinite", "nonfinite": len(broken)}
                batch.events.append(
                    {
                        "event": "nonfinite",
                        "step": step,
                        "tensors": len(broken),
                        "parameters": named,
                    }
                )
            if step == steps // 2:
                entry["new_policy"] = "NormClip(max_norm=0.8)"
            batch.steps.append(entry)
            packed["step"], packed["norms"] = step, np.log10(norms)
            row = step, packed.tobytes()[8:]
            batch.norms.append(row)
            if is_broken or coefficient < 0.1:
                batch.event_norms.append(row)
        writer.write(number, first, batch)
    writer.leave(number)
    return totals, clipped


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    wanted = parser.parse_args()
    write_record(wanted.folder, wanted.steps)
