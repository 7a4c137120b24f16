"""``torch.compile`` around a step: clipping is a break in its graph, and is never traced."""

import pytest
import torch

import gradclip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step_of(module, clip):
    def step(batch):
        module.zero_grad(set_to_none=True)
        module(batch).square().sum().backward()
        return clip()

    return step


def run(compiled, clip_of):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 3)
    step = step_of(module, clip_of(module))
    if compiled:
        step = torch.compile(step, backend="eager")
    norms = []
    for scale in (1.0, 30.0, 0.01, 1.0):
        norms.append(float(step(torch.full((2, 4), scale))))
        assert module.weight.grad.norm() <= 1.0
    return norms


def with_the_object(module):
    clipper = gradclip.GradientClipper(module, 1.0)
    return lambda: clipper.clip().norm_pre


def with_the_function(module):
    return lambda: gradclip.clip_grad_norm_(module.parameters(), 1.0)


@pytest.mark.parametrize("clip_of", [with_the_object, with_the_function])
def test_a_compiled_step_clips_as_a_plain_one(clip_of):
    assert run(True, clip_of) == pytest.approx(run(False, clip_of), rel=1e-6)


def test_nothing_of_ours_is_in_a_graph():
    module, graphs = torch.nn.Linear(4, 3), []

    def look(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    clipper = gradclip.GradientClipper(module, 1.0)
    torch.compile(step_of(module, clipper.clip), backend=look)(torch.ones(2, 4))
    assert clipper.step == 1
    assert not any("linalg_vector_norm" in graph or "segment_reduce" in graph for graph in graphs)
