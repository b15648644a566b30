"""Print one training step, tensor by tensor, and what it costs.  Nothing is computed or trained.

    python tests/lab/dry_run.py --modality s1
    python tests/lab/dry_run.py --modality rgb --data PACK --method pera --arch vit_large
    torchrun --nproc-per-node 8 tests/lab/dry_run.py ...            the share of one of 8 ranks

Takes pretrain.py's flags.  The step runs on the meta device, where tensors have a shape and no
numbers, in float32.  Printed are: the preset and all flags; the parameters of each part; each line
of pretrain.py, losses.py and model.py that makes tensors, with their names and shapes; tokens,
operations and memory; steps and schedules.  Read it beside the ten lines of each method in the
README.  Without --data it makes the toy world first, as pretrain.py does.
"""
import linecache
import os
import sys
import textwrap
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import pretrain  # noqa: E402

# ------------------------------------------------------------------------- tracing the step's lines


def shapes(name, value):
    """["name (2,3)"] of a tensor, ["name[0] (2,3)", ...] of a list of tensors, else []."""
    if torch.is_tensor(value):
        return [f"{name} ({','.join(map(str, value.shape))})"]
    found = []
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            found += shapes(f"{name}[{i}]", item)
    return found


class Tracer:
    """While active it collects each line that makes tensors, as text, indented as calls are nested.

    A line that comes again with the same shapes is left out.
    """

    def __init__(self, *modules):
        self.files = [module.__file__ for module in modules]
        self.texts = []
        self.calls = []       # of each open call: its variables and the line that is under way

    def __enter__(self):
        self.debugger = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.debugger)

    def trace(self, frame, event, _):
        """Python calls this when a function begins, before each of its lines, and at its end."""
        if event == "call":
            if not self.is_interesting(frame.f_code):
                return None                                        # this call is not traced
            self.show({}, frame, f"in {frame.f_code.co_qualname}:", always=True)
            self.calls.append((dict(frame.f_locals), frame.f_lineno))
            return self.trace
        variables, number = self.calls.pop()
        source = linecache.getline(frame.f_code.co_filename, number)
        self.show(variables, frame, " ".join(source.split()))
        if event == "return":
            self.drop_empty_header(frame)
        else:
            self.calls.append((dict(frame.f_locals), frame.f_lineno))
        return self.trace

    def is_interesting(self, code):
        """Is it one of the traced files' functions, and longer than one statement?"""
        if code.co_filename not in self.files or code.co_name.startswith("<"):
            return False
        lines = {number for _, _, number in code.co_lines()}
        return len(lines) > 2 and code.co_name != "of_this_rank"       # which would say little

    def show(self, before, frame, source, always=False):
        """A text with the tensors among the variables that changed since `before`."""
        made = []
        for name, value in frame.f_locals.items():
            if before.get(name) is not value:
                made += shapes(name, value)
        text = f"{'  ' * len(self.calls) + ', '.join(made):<64} {source}"
        if (made or always) and text not in self.texts:
            self.texts.append(text)

    def drop_empty_header(self, frame):
        """Removes the head of a function that made nothing."""
        if self.texts[-1].endswith(f" in {frame.f_code.co_qualname}:"):
            self.texts.pop()


# ------------------------------------------------------------------------------- what a step costs


def note_tokens(net):
    """-> list that a step fills with how many tokens of a view the blocks of the ViTs compute."""
    found = []

    def note(name):
        def hook(block, inputs):
            text = f"{name} {inputs[0].shape[1]}"                         # tokens are (B,N,D)
            if text not in found:
                found.append(text)
        return hook

    for name, branch in (("student", net.student), ("teacher", net.teacher)):
        for block in getattr(branch.backbone, "blocks", []):
            block.register_forward_pre_hook(note(name))
    return found


def run_step(net, x, y, args):
    """One micro-batch, forward and backward.  Returns the lines of text, the number of operations,
    and the bytes that autograd holds from forward to backward, beside the weights."""
    draws = pretrain.StepRandomness(args.seed, 0, 0, 0, 1)
    values = pretrain.schedules(args, 0, 100)
    held = []

    def hold(tensor):
        held.append(tensor)                         # alive, so that no other gets its storage
        return tensor
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            with Tracer(pretrain, losses, models) as tracer:
                result = pretrain.STEPS[args.method](net, x, y, args, draws, values)
        result.loss.backward()

    weights = set()
    for branch in (net.student, net.teacher):
        weights |= {storage(p) for p in branch.parameters()}
    sizes = {}
    for tensor in held:
        if storage(tensor) not in weights:
            sizes[storage(tensor)] = tensor.untyped_storage().nbytes()
    return tracer.texts, counter.get_total_flops(), sum(sizes.values())


def storage(tensor):
    """Names a tensor's memory.  (A meta tensor has no address, so the storage object does.)"""
    return tensor.untyped_storage()._cdata


# ------------------------------------------------------------------------------------- the printing


def count_parameters(branch):
    return sum(p.numel() for p in branch.parameters())


def print_parameters(net):
    for name, branch in (("student", net.student), ("teacher", net.teacher)):
        counts = [f"parameters in millions {count_parameters(branch) / 1e6:.2f}"]
        for part, module in branch.named_children():
            counts.append(f"{part} {count_parameters(module) / 1e6:.2f}")
        print(f"{name}: {', '.join(counts)}")


def print_costs(net, tokens, flops, activations, args, micro_batch, world):
    print(f"tokens of a view, CLS included: {', '.join(tokens) or 'none, a ResNet'}")
    tera = flops / 1e12
    print(f"operations: {tera:.4g} TFLOP a micro-batch of {micro_batch} scenes, "
          f"{tera * args.accum * world:.4g} TFLOP a step of {args.batch_size}")
    student = 4e-9 * count_parameters(net.student)                         # GB in float32
    teacher = 4e-9 * count_parameters(net.teacher)
    print(f"memory of a rank in GB: parameters {student:.2f}, gradients {student:.2f}, "
          f"AdamW {2 * student:.2f}, teacher {teacher:.2f}, activations {activations / 1e9:.2f} "
          f"(float32; bf16: about half)")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if os.environ.get("RANK", "0") != "0":
        return
    world = int(os.environ.get("WORLD_SIZE", 1))
    # a run that lies in --out does not matter, and the meta device knows no autocast
    args = pretrain.resolve_flags([*argv, "--resume", "--amp", "off"])
    print(pretrain.describe_run(args, pretrain.versions(args, world)))
    flags = [f"{name} {value}" for name, value in pretrain.plain_flags(args).items()]
    print(textwrap.fill(f"flags: {', '.join(flags)}", 100, subsequent_indent="    "))

    pack = args.pack
    micro_batch = args.batch_size // world // args.accum
    views = pretrain.VIEWS[args.method]
    with torch.device("meta"):
        net = pretrain.networks(args, torch.device("meta"), quiet=True)
        x = torch.empty(micro_batch, views, *pack.images.shape[1:], dtype=torch.uint8)
        y = torch.empty(micro_batch, views, len(pack.classes))
    print_parameters(net)

    tokens = note_tokens(net)
    texts, flops, activations = run_step(net, x, y, args)
    print("what each line makes; lines that come with the same shapes again are left out:")
    print("\n".join(texts))
    print_costs(net, tokens, flops, activations, args, micro_batch, world)
    steps_per_epoch = len(args.scenes) // args.batch_size
    total = args.epochs * steps_per_epoch
    print(f"steps: {total}, {steps_per_epoch} an epoch")
    for step in (0, total // 2, total - 1):
        values = pretrain.schedules(args, step, total)
        print(f"step {step}: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}")


if __name__ == "__main__":
    try:
        main()
    except (data.InputError, models.CheckpointError, OSError) as error:
        sys.exit(f"dry_run.py: error: {error}")
