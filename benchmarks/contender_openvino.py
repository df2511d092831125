"""OpenVINO as a contender of peers.py, run by an interpreter that has it: this project's own packages are not needed.

The checkpoint goes through optimum-intel, OpenVINO's exporter for `transformers` models, and NNCF, its compression of
weights; what comes out runs on OpenVINO's runtime with the LATENCY hint, all cores and one stream, in float32.

float32: the checkpoint's weights as they are.  int8: 8 bits, asymmetric, per output channel, embedding and head too.
int4: 4 bits, symmetric, a scale for every 128 inputs; embedding and head in 8 bits, as is NNCF's default.
Keys and values are kept in the runtime's default: float16 for float32 weights, and 8 bits for compressed ones.

OpenVINO GenAI's continuous batching is not used: with 2026.4.1 its conversion to paged attention makes MPT generate
other tokens, with float32 weights, keys and values too.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from contender_process import Generate, OnToken, run_on_new_thread

COMPRESSION: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "sym": False},
    "int4": {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0},
}


def by_openvino(folder: Path, dtype: str, greedy: bool) -> Generate:
    """Return OpenVINO. dtype: float32, int8 or int4."""
    import numpy as np
    import openvino as ov

    del greedy  # it always is, so that no sampler of ours is measured
    core = ov.Core()
    with tempfile.TemporaryDirectory() as scratch:
        run_on_new_thread(convert_for_openvino, folder, Path(scratch), dtype)
        model = core.read_model(Path(scratch) / "openvino_model.xml")
        keep_last_position(model)
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        cores = len(os.sched_getaffinity(0))
        compiled = core.compile_model(model, "CPU", hints | {"INFERENCE_NUM_THREADS": cores})
    request = compiled.create_infer_request()

    def generate(prompts: list[list[int]], n_new: int, _: bool, on_token: OnToken) -> list[list[int]]:
        request.reset_state()
        rows: Any = np.arange(len(prompts), dtype=np.int32)
        ids: Any = np.array(prompts, dtype=np.int64)
        found: list[list[int]] = [[] for _ in prompts]
        for n_seen in range(len(prompts[0]), len(prompts[0]) + n_new):
            mask: Any = np.ones((len(prompts), n_seen), dtype=np.int64)
            request.infer({"input_ids": ids, "attention_mask": mask, "beam_idx": rows}, share_inputs=True)
            ids = request.get_tensor("logits").data[:, -1].argmax(-1).astype(np.int64)[:, None]
            for row, token in enumerate(ids[:, 0].tolist()):
                found[row].append(token)
                on_token(row)
        return found

    return generate


def convert_for_openvino(folder: Path, converted: Path, dtype: str) -> None:
    warnings.filterwarnings("ignore")  # of tracing
    # Nothing is to be sent; and without a network each event starts a process and waits for it.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    how: dict[str, Any] = {"load_in_8bit": False}
    if dtype in COMPRESSION:
        how = {"quantization_config": OVWeightQuantizationConfig(**COMPRESSION[dtype])}
    model = OVModelForCausalLM.from_pretrained(str(folder), export=True, compile=False, **how)
    model.save_pretrained(converted)


def keep_last_position(model: Any) -> None:
    """Cut all positions but the last from what the vocabulary product multiplies, in place.

    OpenVINO GenAI does the same to the models that it runs.
    """
    import numpy as np
    from openvino import opset13 as operations

    product = model.output("logits").get_node().input_value(0).get_node()
    if product.get_type_name() != "MatMul":
        raise RuntimeError(f"the logits come from {product.get_type_name()}, not from a product")
    index, axis = np.array([-1], dtype=np.int64), np.int64(1)
    product.input(0).replace_source_output(operations.gather(product.input_value(0), index, axis).output(0))
    model.validate_nodes_and_infer_types()
