"""The private names of torch that the package uses, each with the feature that is lost where a torch has it no more.

Private names may go with any minor version, so pyproject.toml bounds torch from above. To try a new one: install it and
run this file. Each failure names what would break; the rest of the suite says whether what is still there still works.
"""

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "deepseek"

# Feature -> the private names that it needs.
FEATURES = {
    "NCCL's flight recorder in the report of a collective that hangs": (
        "torch._C._distributed_c10d._dump_fr_trace_json",
    ),
    "ds_memory_profiler: what is allocated in the backward pass": ("torch._C._current_graph_task_id",),
    "ds.jit: the compiler backend that its graphs are handed to": (
        "torch._dynamo.lookup_backend",
        "torch._inductor.compile_fx.compile_fx",
    ),
    "ds.jit: a sentence with file and line instead of an error of torch": (
        "torch._dynamo.exc.FailOnRecompileLimitHit",
        "torch._dynamo.utils.graph_break_reasons",
        "torch._dynamo.utils.get_compilation_metrics",
    ),
    "ds.jit: no graph runs beside hooks on all modules, and a number that Python needs is refused with its line": (
        "torch._guards.TracingContext.extract_stack",
        "torch.nn.modules.module._global_backward_hooks",
        "torch.nn.modules.module._global_backward_pre_hooks",
        "torch.nn.modules.module._global_forward_hooks",
        "torch.nn.modules.module._global_forward_pre_hooks",
    ),
    "ds.jit: what tracing reads of modules is guarded, and errors are translated": (
        "torch._dynamo.config.skip_nnmodule_hook_guards",
        "torch._dynamo.exc.BackendCompilerFailed",
        "torch._dynamo.exc.TorchDynamoException",
    ),
    "ds.jit: one graph for each kind of argument, floats among them": (
        "torch._dynamo.config.recompile_limit",
        "torch._dynamo.config.specialize_float",
    ),
    "ONNX files: a copy of a converted model takes arrays, and names of the file, too": (
        "torch.fx.graph_module.GraphModule._register_deepcopy_hook",
    ),
    "ds.jit: assertions and loops in the graph, with gradients": (
        "torch._assert_async",
        "torch._dynamo.graph_break",
        "torch._higher_order_ops.while_loop",
    ),
    "ds.jit(fullgraph=False): tracing again from a break, without running again what came before it": (
        "torch._dynamo.exc.ShortenTraceback",
        "torch._dynamo.exc.TorchDynamoException.__init__",
        "torch._dynamo.exc.UnspecializeRestartAnalysis",
    ),
    "ds.jit: branches and loops tried without changing what outlives the trial": (
        "torch._guards.TracingContext.try_get",
        "torch._dynamo.exc.RestartAnalysis",
        "torch._dynamo.exc.SkipFrame",
        "torch._dynamo.variables.ConstantVariable.create",
        "torch._dynamo.variables.LazyVariableTracker.realize_all",
        "torch._dynamo.variables.base.VariableTracker.visit",
        "torch._dynamo.variables.higher_order_ops.TorchHigherOrderOperatorVariable",
        "torch._dynamo.variables.higher_order_ops._hop_name_to_variable_class",
        "torch._dynamo.variables.higher_order_ops.add_call_function",
        "torch._dynamo.variables.higher_order_ops.make_attr",
        "torch._dynamo.variables.higher_order_ops.move_lifted_freevars_phs_to_end",
        "torch._dynamo.variables.higher_order_ops.overwrite_tensor_vt_proxy",
        "torch._dynamo.variables.tensor.SymNodeVariable",
        "torch._higher_order_ops.utils.setup_compilation_env",
    ),
    "ds.dynamic_graph: lengths that do not compile again": (
        "torch._dynamo.mark_dynamic",
        "torch._dynamo.maybe_mark_dynamic",
        "torch._dynamo.config.patch",
        "torch._dynamo.exc.UserError",
        "torch.fx.experimental._config.patch",
        "torch.nn.modules.batchnorm._BatchNorm",
    ),
    "ds.dynamic_graph: any torch.compile backend by name": ("torch._dynamo.backends.registry.lookup_backend",),
    "ds.dynamic_graph: nested arguments padded and unpadded": (
        "torch.utils._pytree.TreeSpec",
        "torch.utils._pytree.keystr",
        "torch.utils._pytree.tree_flatten",
        "torch.utils._pytree.tree_flatten_with_path",
        "torch.utils._pytree.tree_leaves",
        "torch.utils._pytree.tree_map",
        "torch.utils._pytree.tree_unflatten",
    ),
    "ds.dynamic_graph: compiled code kept for the next process": (
        "torch._inductor.codecache.CppCodeCache",
        "torch._inductor.codecache.CppPythonBindingsCodeCache",
        "torch._inductor.codecache.CppWrapperCodeCache",
        "torch._inductor.runtime.cache_dir_utils.cache_dir",
        "torch.compiler._cache.CacheArtifactManager.deserialize",
        "torch.compiler._cache.CacheArtifactManager.populate_caches",
    ),
    "ds.dynamic_graph: kernels compiled together, cold starts in a fifth of the time": (
        "torch._inductor.async_compile.AsyncCompile",
        "torch._inductor.codecache.CppPythonBindingsCodeCache.load_async",
        "torch._inductor.codecache.CppPythonBindingsCodeCache.load_pybinding",
        "torch._inductor.codecache.CppPythonBindingsCodeCache.suffix_template.format",
        "torch._inductor.compile_fx.compile_fx_inner",
        "torch._inductor.config.cpp.vec_isa_ok",
        "torch._inductor.config.patch",
        "torch._inductor.cpu_vec_isa.valid_vec_isa_list",
        "torch._inductor.cpu_vec_isa.valid_vec_isa_list.cache_clear",
        "torch._inductor.exc.CppCompileError",
    ),
    "the inductor backend: settings for inference, and what it compiled": (
        "torch._dynamo.utils.counters",
        "torch._inductor.config.pre_grad_custom_pass",
    ),
    "graph passes: which operators have effects, shapes without data": (
        "torch._C",
        "torch._ops.HigherOrderOperator",
        "torch._ops.OpOverload",
        "torch._subclasses.fake_tensor.DataDependentOutputException",
        "torch._subclasses.fake_tensor.DynamicOutputShapeException",
        "torch._subclasses.fake_tensor.FakeTensorMode",
    ),
    "fusion: oneDNN's convolutions and linear layers with what follows them": (
        "torch.ops.mkldnn._convolution_pointwise.binary",
        "torch.ops.mkldnn._convolution_pointwise.default",
        "torch.ops.mkldnn._convolution_pointwise_.binary",
        "torch.ops.mkldnn._linear_pointwise.default",
        "torch.ops.mkldnn._reorder_convolution_weight",
    ),
    "a memory budget for training": (
        "torch._dynamo.backends.common.aot_autograd",
        "torch._dynamo.backends.debugging.boxed_nop",
        "torch._functorch.config.activation_memory_budget",
        "torch._functorch.config.patch",
        "torch._functorch.partitioners.min_cut_rematerialization_partition",
    ),
    "peak memory and costs read off a run: storages and operators counted": (
        "torch.utils._python_dispatch.TorchDispatchMode",
    ),
    "CUDA graphs by bucket": ("torch.utils._pytree.tree_map_only",),
    "16 bits only where the processor has instructions for them": (
        "torch.cpu._is_amx_tile_supported",
        "torch.cpu._is_avx512_bf16_supported",
        "torch.ops.mkldnn._is_mkldnn_fp16_supported",
    ),
    "int8 layers, and int8 only where the processor is fast at it": (
        "torch._make_per_channel_quantized_tensor",
        "torch.cpu._is_vnni_supported",
    ),
    "packed models: weights in oneDNN's order": (
        "torch.ops.mkldnn._is_mkldnn_bf16_supported",
        "torch.ops.mkldnn._linear_pointwise",
        "torch.ops.mkldnn._reorder_linear_weight",
    ),
    "PrecisionManager and GradScaler: many tensors in one call": (
        "torch._amp_foreach_non_finite_check_and_unscale_",
        "torch._foreach_copy_",
        "torch.nn.modules.batchnorm._NormBase",
    ),
    "clipping many gradients in one call": ("torch._foreach_mul_",),
    "averaging many weights in one call": ("torch._foreach_lerp_",),
}
# Named in a string or a keyword, or a method of a value, where the walk below does not see them.
SETTINGS = {
    "torch._inductor.config.cpp.vec_isa_ok",
    "torch._functorch.config.activation_memory_budget",
    "torch.fx.graph_module.GraphModule._register_deepcopy_hook",
}
ROWS = [(name, feature) for feature, names in FEATURES.items() for name in names]


def is_private(name):
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def torch_aliases(tree):
    """Name in the file -> what of torch it stands for."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "torch":
                    aliases[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return aliases


def private_names(tree):
    """The longest names of torch that a file uses, aliases resolved, if one of their parts is private."""
    aliases = torch_aliases(tree)
    found, inner = set(aliases.values()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner:
            parts, root = [], node
            while isinstance(root, ast.Attribute):
                inner.add(root)
                parts.append(root.attr)
                root = root.value
            if isinstance(root, ast.Name) and root.id in aliases:
                found.add(".".join([aliases[root.id], *reversed(parts)]))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(re.findall(r"^torch(?:\.\w+)+$", node.value))
    return {name for name in found if is_private(name)}


def find(name):
    """What a dotted name stands for, its modules imported on the way."""
    found = torch
    for length, part in enumerate(name.split(".")[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            importlib.import_module(".".join(name.split(".")[:length]))
            found = getattr(found, part)
    return found


@pytest.mark.parametrize(("name", "feature"), ROWS, ids=[name for name, _ in ROWS])
def test_this_torch_has(name, feature):
    try:
        find(name)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"torch {torch.__version__} has no {name} ({error}); lost: {feature}")


def test_the_list_is_that_of_the_code():
    used = set().union(*(private_names(ast.parse(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py")))
    listed = {name for name, _ in ROWS}
    modules = {name.rsplit(".", count)[0] for name in listed for count in range(1, name.count("."))}
    assert sorted(used - listed - modules) == [], "add a row with the feature that needs it"
    assert sorted(listed - used - SETTINGS) == [], "used no more; take the row away"


def test_a_name_that_is_gone_is_noticed():
    with pytest.raises(ImportError):
        find("torch._dynamo.no_such_name")


def test_the_installed_torch_is_within_the_bounds_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = (text for text in project["dependencies"] if text.startswith("torch"))
    lowest, above = re.fullmatch(r"torch>=([\d.]+),<([\d.]+)", requirement).groups()
    assert version(lowest) <= version(torch.__version__) < version(above)


def version(text):
    return tuple(int(part) for part in text.partition("+")[0].split(".")[:2])
