"""Which kernel multiplies by weights in 4 bits fastest on this CPU? One product of the 8B shape with each at hand.

    OMP_NUM_THREADS=1 python benchmarks/int4_products.py [--outputs 14336 --inputs 4096]

Processor time, the ways in turn; error of the product of normal weights against fp32; seconds to the first product,
quantising included. A kernel whose package is missing is left out.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import machine
from torch import Tensor

from illada.weights.int4 import GROUP, Int4Linear, quantized

ROWS = (1, 64, 256)
Product = Callable[[Tensor], Tensor]


def bf16(weight_NK: Tensor) -> Product:
    return lambda rows_MK: rows_MK @ weight_NK.T


def openvino(weight_NK: Tensor) -> Product:
    """What --quantize int4 is."""
    layer = Int4Linear(*weight_NK.T.shape)
    for name, tensor in quantized(weight_NK).items():
        getattr(layer, name).data = tensor
    return layer


def tinygemm(weight_NK: Tensor) -> Product:
    """A kernel of torch, quantised by torchao: what --quantize int4 was."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    packed = Int4OpaqueTensor.from_hp(weight_NK, [1, GROUP])
    return lambda rows_MK: torch.nn.functional.linear(rows_MK, packed)


def onnxruntime(weight_NK: Tensor) -> Product:
    """MatMulNBits with activations in int8."""
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime import InferenceSession, SessionOptions

    (outputs, inputs), parts = weight_NK.shape, quantized(weight_NK)
    tensors = {
        "levels": parts["weight"].unflatten(1, (-1, GROUP // 2)),
        "scale": parts["scale"],
        "zero": parts["zero"][:, 1::2] << 4 | parts["zero"][:, ::2],
    }
    sizes = {"K": inputs, "N": outputs, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["rows", *tensors], ["product"], domain="com.microsoft", **sizes)
    rows, product = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", width])
        for name, width in (("rows", inputs), ("product", outputs))
    )
    constants = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    graph = helper.make_graph([node], "product", [rows], [product], constants)
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    session = InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda rows_MK: torch.from_numpy(session.run(None, {"rows": rows_MK.float().numpy()})[0]).bfloat16()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=14336)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    weight_NK = (torch.randn(args.outputs, args.inputs) * 0.02).bfloat16()
    rows = {count: torch.randn(count, args.inputs).bfloat16() for count in ROWS}
    exact = rows[64].float() @ weight_NK.float().T
    ways: dict[str, Product] = {}
    about: dict[str, list[str]] = {}
    for way in (bf16, openvino, tinygemm, onnxruntime):
        start = time.process_time()
        try:
            product = way(weight_NK)
        except ImportError as error:
            print(f"{way.__name__}: {error}")
            continue
        found = product(rows[64]).float()
        error = (found - exact).norm() / exact.norm()
        about[way.__name__] = [f"{error:.4f}", f"{time.process_time() - start:.2f}"]
        ways[way.__name__] = product
    times: dict[tuple[str, int], list[float]] = {(name, count): [] for name in ways for count in ROWS}
    for _ in range(args.repeats):
        for (name, count), taken in times.items():
            start = time.process_time()
            ways[name](rows[count])
            taken.append(1e3 * (time.process_time() - start))
    print(f"{machine()}; {args.outputs} x {args.inputs}, median of {args.repeats}\n")
    print("| kernel |", "".join(f" ms at {count} |" for count in ROWS), "error | first (s) |")
    print("|---" * (3 + len(ROWS)) + "|")
    for name in ways:
        cells = [f"{statistics.median(times[name, count]):.1f}" for count in ROWS]
        print("|", " | ".join([name, *cells, *about[name]]), "|")


if __name__ == "__main__":
    main()
