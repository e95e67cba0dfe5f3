"""The cases: those of `topk_softmax` without a bias, which break gating wherever it is."""

from numba_moe.verify.cases import Case, edge_cases, model_cases


def margin_cases() -> list[Case]:
    every = (case for case in (*model_cases("simulator"), *edge_cases()) if case.op == "topk_softmax")
    return [case._replace(op="topk_softmax_with_margin") for case in every if "bias" not in case.name]
