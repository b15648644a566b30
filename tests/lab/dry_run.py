"""Print one training step, tensor by tensor, and what it costs.  Nothing is computed or written.

    python tests/lab/dry_run.py --modality s1
    python tests/lab/dry_run.py --modality rgb --data DIR --method pera --arch vit_large
    torchrun --nproc-per-node 8 tests/lab/dry_run.py ...            the share of one of 8 ranks

Takes pretrain.py's flags.  The step runs on the meta device, where tensors have a shape and no
numbers.  Printed are: the preset and all flags; the parameters of each part; each line of
pretrain.py, losses.py and model.py that makes tensors, with their names and shapes; tokens,
operations and memory; steps and schedules.  Read it beside the ten lines of each method in the
README.  Without --data and before the first training there is no toy world to count: then the
number of steps is a guess.
"""
import linecache
import os
import sys
import textwrap
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))
import data  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import pretrain  # noqa: E402

GUESSED_STEPS = 100                 # steps an epoch, if no data are there to count
TOY_SIZE = 36                       # pixels of an image of the toy world
HOUSEKEEPING = ["StepRandomness.ours"]          # functions that would say little in the listing

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
            if not self.interesting(frame.f_code):
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

    def interesting(self, code):
        """Is it one of the traced files' functions, and longer than one statement?"""
        if code.co_filename not in self.files or code.co_name.startswith("<"):
            return False
        lines = {number for _, _, number in code.co_lines()}
        return len(lines) > 2 and code.co_qualname not in HOUSEKEEPING

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


class Tokens:
    """Notes how many tokens of a view the blocks of a ViT compute, in order."""

    def __init__(self, net):
        self.found = []
        for name, branch in (("student", net.student), ("teacher", net.teacher)):
            for block in getattr(branch.backbone, "blocks", []):
                block.register_forward_pre_hook(self.hook(name))

    def hook(self, name):
        def note(block, inputs):
            _, groups = inputs                      # (tokens, [(views, tokens of a view), ...])
            text = f"{name} {' and '.join(str(n) for _, n in groups)}"
            if text not in self.found:
                self.found.append(text)
        return note


def storage(tensor):
    """Names a tensor's memory.  (A meta tensor has no address, so the storage object does.)"""
    return tensor.untyped_storage()._cdata


def run_step(net, x, y, args):
    """One micro-batch, forward and backward.  Returns the lines of text, the number of operations,
    and the bytes that autograd holds from forward to backward, beside the weights."""
    draws = pretrain.StepRandomness(args.seed, 0, 0, 0, 1)
    now = pretrain.schedules(args, 0, 100)
    held = []

    def hold(tensor):
        held.append(tensor)                         # alive, so that no other gets its storage
        return tensor
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            with Tracer(pretrain, losses, models) as tracer, mock.patch.object(
                    pretrain, "autocast", autocast_as_on_cpu):
                loss, *_ = pretrain.STEPS[args.method](net, x, y, args, draws, now)
        loss.backward()

    weights = set()
    for branch in (net.student, net.teacher):
        weights |= {storage(p) for p in branch.parameters()}
    sizes = {}
    for tensor in held:
        if storage(tensor) not in weights:
            sizes[storage(tensor)] = tensor.untyped_storage().nbytes()
    return tracer.texts, counter.get_total_flops(), sum(sizes.values())


def autocast_as_on_cpu(args, device):
    """pretrain.autocast for the meta device, which autocast does not know: the CPU's types."""
    return torch.autocast("cpu", torch.bfloat16, enabled=args.amp == "bf16")


# ------------------------------------------------------------------------------------- the printing


def print_settings(args, world):
    """The preset, what differs from it, and every flag."""
    print(pretrain.describe_run(args, world, torch.device("meta")))
    flags = [f"{name} {value}" for name, value in vars(args).items() if name != "sensor"]
    print(textwrap.fill(f"flags: {', '.join(flags)}", 100, subsequent_indent="    "))


def count_parameters(branch):
    return sum(p.numel() for p in branch.parameters())


def print_parameters(net):
    for name, branch in (("student", net.student), ("teacher", net.teacher)):
        counts = [f"parameters in millions {count_parameters(branch) / 1e6:.2f}"]
        for part, module in branch.named_children():
            counts.append(f"{part} {count_parameters(module) / 1e6:.2f}")
        print(f"{name}: {', '.join(counts)}")


def print_costs(net, tokens, flops, activations, args, micro_batch, world):
    print(f"tokens of a view, CLS included: {', '.join(tokens.found) or 'none, a ResNet'}")
    tera = flops / 1e12
    print(f"operations: {tera:.4g} TFLOP a micro-batch of {micro_batch} scenes, "
          f"{tera * args.accum * world:.4g} TFLOP a step of {args.batch_size}")
    student = 4e-9 * count_parameters(net.student)                         # GB in float32
    teacher = 4e-9 * count_parameters(net.teacher)
    print(f"memory of a rank in GB: parameters {student:.2f}, gradients {student:.2f}, "
          f"AdamW {2 * student:.2f}, teacher {teacher:.2f}, activations {activations / 1e9:.2f} "
          f"(float32; bf16: about half)")


def print_schedules(args, steps_per_epoch, guessed):
    total = args.epochs * steps_per_epoch
    remark = " (a guess: no data are here yet)" if guessed else ""
    print(f"steps: {total}, {steps_per_epoch} an epoch{remark}")
    for step in (0, total // 2, total - 1):
        now = pretrain.schedules(args, step, total)
        values = ", ".join(f"{name} {value:.4g}" for name, value in now.items())
        print(f"step {step}: {values}")


def look_at_data(args):
    """-> (side of an image, number of label classes, steps an epoch, are these guessed)"""
    if not args.data and not os.path.isdir("toy"):
        return TOY_SIZE, len(data.CLASSES), GUESSED_STEPS, True
    scenes = pretrain.open_scenes(args, 1)
    train = pretrain.scenes_to_train_on(args, scenes)
    return scenes.size, scenes.labels[0].shape[1], len(train) // args.batch_size, False


def main(argv=None):
    args = pretrain.parse(argv)
    resume = args.resume
    args.resume = True                                    # a run that lies in --out does not matter
    pretrain.refuse_impossible_flags(args)
    if os.environ.get("RANK", "0") != "0":
        return
    world = int(os.environ.get("WORLD_SIZE", 1))
    size, classes, steps_per_epoch, guessed = look_at_data(args)
    args.resume = resume
    print_settings(args, world)

    micro_batch = args.batch_size // world // args.accum
    views = pretrain.VIEWS[args.method]
    with torch.device("meta"):
        net = pretrain.networks(args, torch.device("meta"), quiet=True)
        x = torch.empty(micro_batch, views, len(args.sensor.bands), size, size, dtype=torch.uint8)
        y = torch.empty(micro_batch, views, classes)
    print_parameters(net)

    tokens = Tokens(net)
    texts, flops, activations = run_step(net, x, y, args)
    print("what each line makes; lines that come with the same shapes again are left out:")
    print("\n".join(texts))
    print_costs(net, tokens, flops, activations, args, micro_batch, world)
    print_schedules(args, steps_per_epoch, guessed)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"dry_run.py: error: {data.error_message(error)}")
