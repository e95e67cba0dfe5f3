"""What the peers' releases call by position or keyword, ours take: signatures of these releases are data here."""

import functools
import inspect
import json
import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from numba_moe.interop import sglang, sglang_kernels, vllm
from numba_moe.interop.patching import Patch, lacking

SIGNATURES = json.loads((Path(__file__).parent / "data" / "peer_signatures.json").read_text())
PATCHES = {"vllm": vllm.PATCH, "sglang": sglang.PATCH, "sglang-kernel": sglang.PATCH}
FUNCTIONS = [(release, path) for release, functions in SIGNATURES.items() for path in functions]


def stand_in(signature):
    """Return a function of this signature that does nothing."""
    scope = {"torch": torch}
    exec(f"def stand_in({signature}): return 'theirs'", scope)
    return scope["stand_in"]


def make_module(name, **contents):
    made = types.ModuleType(name)
    made.__path__ = []
    vars(made).update(contents)
    sys.modules[name] = made
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules.get(parent) or make_module(parent), last, made)
    return made


@pytest.fixture
def installed():
    """Return a function that puts stand-ins with a release's signatures where imports look, and takes them away."""
    made = []

    def install(release, **others):
        for path, signature in {**SIGNATURES[release], **others}.items():
            module, _, name = path.rpartition(".")
            made.append(module.partition(".")[0])
            setattr(sys.modules.get(module) or make_module(module), name, stand_in(signature))

    yield install
    for patch in PATCHES.values():
        patch.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] in made]:
        del sys.modules[name]


def function_at(path):
    module, _, name = path.rpartition(".")
    return getattr(sys.modules[module], name)


@pytest.mark.parametrize("release", SIGNATURES)
def test_every_function_of_a_release_is_replaced_and_put_back(release, installed):
    installed(release)
    before = {path: function_at(path) for path in SIGNATURES[release]}
    assert sorted(PATCHES[release.split()[0]].apply()) == sorted(before)
    assert all(function_at(path).__module__.startswith("numba_moe.interop") for path in before)
    PATCHES[release.split()[0]].undo()
    assert {path: function_at(path) for path in before} == before


@pytest.mark.parametrize(("release", "path"), FUNCTIONS)
def test_ours_has_the_parameters_of_theirs_at_their_places_with_their_defaults(release, path, installed):
    theirs = inspect.signature(stand_in(SIGNATURES[release][path])).parameters
    installed(release)
    PATCHES[release.split()[0]].apply([path.rpartition(".")[2]])
    ours = inspect.signature(function_at(path)).parameters
    for place, (name, parameter) in enumerate(theirs.items()):
        assert name in ours
        assert ours[name].default == parameter.default
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert list(ours)[place] == name
    extra = [parameter for name, parameter in ours.items() if name not in theirs]
    assert all(parameter.default is not parameter.empty for parameter in extra)  # so theirs' calls are whole calls
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values())


def test_the_newest_releases_have_every_function_that_is_replaced():
    newest = {path for release in ("vllm 0.33", "sglang 0.5.23") for path in SIGNATURES[release]}
    newest |= set(SIGNATURES["sglang-kernel 0.4.6"])
    replaced = {
        f"{module}.{name}"
        for patch in (vllm.PATCH, sglang.PATCH)
        for module, functions in patch._replacements.items()
        for name in functions
    }
    gone = {"sgl_kernel.moe.moe_fused_gate", "sgl_kernel.moe.kimi_k2_moe_fused_gate"}
    assert replaced - gone == newest
    assert gone < set(SIGNATURES["sglang-kernel 0.4.4"])


def test_a_form_of_a_later_release_stays_and_is_named(installed, caplog):
    path = f"{vllm.LAYERS}.router.fused_topk_router.fused_topk"
    later = SIGNATURES["vllm 0.33"][path] + ", num_shared_experts=0"
    installed("vllm 0.33", **{path: later})
    before = function_at(path)
    with caplog.at_level(logging.WARNING, "numba_moe"):
        replaced = vllm.patch()
    assert path not in replaced
    assert function_at(path) is before
    assert "fused_topk stays as it is" in caplog.text
    assert "`num_shared_experts`" in caplog.text
    with pytest.raises(ValueError, match=r"`names` must be of a function .*`num_shared_experts`.*, got 'fused_topk'"):
        vllm.patch(["fused_topk"])
    installed("vllm 0.33", **{path: "gating_output, hidden_states, topk, renormalize"})
    assert path not in vllm.patch()  # the same names at other places


def test_older_forms_of_sgl_kernel_are_served_as_they_were(installed):
    align, softmax = "sgl_kernel.moe.moe_align_block_size", "sgl_kernel.moe.topk_softmax"
    older = "topk_ids, num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad, token_cnts_buffer, "
    older += "cumsum_buffer"
    choices = "topk_weights, topk_ids, token_expert_indices, gating_output"
    installed("sglang-kernel 0.4.4", **{align: older, softmax: choices})
    assert {align, softmax} < set(sglang.patch())
    ids = torch.tensor([[0, 3], [3, 1]], dtype=torch.int32)
    names = dict(
        zip(older.split(", "), [ids, 4, 2, *(torch.empty(8, dtype=torch.int32) for _ in range(5))], strict=True)
    )
    names |= {"experts_ids": names["experts_ids"][:4], "num_tokens_post_pad": names["num_tokens_post_pad"][:1]}
    function_at(align)(**names)
    assert names["sorted_token_ids"].tolist() == [0, 4, 3, 4, 1, 2, 4, 4]  # experts 0, 1 and 3, none of them lost
    assert names["experts_ids"].tolist() == [0, 1, 3, -1]
    weights, chosen, numbers = torch.empty(2, 1), *(torch.empty(2, 1, dtype=torch.int32) for _ in range(2))
    function_at(softmax)(weights, chosen, numbers, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert (chosen.tolist(), numbers.tolist()) == ([[1], [0]], [[0], [1]])


def test_a_name_that_the_installed_release_lacks_is_refused(installed):
    installed("sglang-kernel 0.4.6")
    with pytest.raises(ValueError, match="`names` must be functions of the installed release, got 'moe_fused_gate'"):
        sglang.patch(["moe_sum", "moe_fused_gate"])
    assert function_at("sgl_kernel.moe.moe_sum")(None, None) == "theirs"  # nothing was replaced halfway


def test_kernels_that_sglang_has_looked_up_are_looked_up_again(installed):
    installed("sglang 0.5.23")
    selector = make_module("sglang.kernels.selector", _resolve=functools.cache(function_at), other=5)
    gate = f"{sglang.KERNELS}.moe_align_small_numel.moe_align_small_numel"
    theirs = selector._resolve(gate)
    sglang.patch()
    ours = selector._resolve(gate)
    sglang.unpatch()
    assert ours.__module__ == "numba_moe.interop.sglang_kernels"
    assert selector._resolve(gate) is theirs


def test_sglang_without_sgl_kernel_is_patched_and_nothing_at_all_is_an_import_error(installed):
    with pytest.raises(ImportError, match="sgl_kernel or sglang must be installed to be patched"):
        sglang.patch()
    installed("sglang 0.5.23")
    assert len(sglang.patch()) == len(SIGNATURES["sglang 0.5.23"])


def test_flashinfer_is_patched_where_it_can_be_imported_and_is_not_enough(installed, monkeypatch):
    gate = "flashinfer.fused_moe.fused_routing_dsv3.fused_topk_deepseek"
    installed("sglang 0.5.23")
    theirs = function_at(gate)
    holder = make_module("sglang.srt.layers.moe.topk", _fused_topk_deepseek=theirs)  # by a name of its own
    assert gate in sglang.patch()
    assert holder._fused_topk_deepseek is sglang_kernels.fused_topk_deepseek
    sglang.unpatch()
    assert holder._fused_topk_deepseek is theirs
    for name in [name for name in sys.modules if name.partition(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # what breaks at its import
    assert gate not in sglang.patch()
    sglang.unpatch()


def test_the_plugin_of_sglang_patches_when_the_environment_asks(installed, monkeypatch):
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.entry-points."sglang.srt.plugins"]\nnumba_moe = "numba_moe.interop.sglang:plugin"' in text
    installed("sglang 0.5.23")
    monkeypatch.delenv("NUMBA_MOE_SGLANG", raising=False)
    assert sglang.plugin() is None
    monkeypatch.setenv("NUMBA_MOE_SGLANG", "1")
    assert f"{sglang.KERNELS}.moe_fused_gate.moe_fused_gate" in sglang.plugin()


def test_a_function_that_does_not_say_what_it_takes_is_replaced():
    assert lacking(sglang.moe_sum, print) == []
    assert lacking(sglang.moe_sum, lambda *args, **kwargs: None) == []
    assert lacking(sglang.moe_sum, lambda input_tensor, *, out=None: None) == ["out"]
    assert Patch(["json"], {"json": {"dumps": json.dumps}}).apply() == ["json.dumps"]
