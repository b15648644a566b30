"""Print one training step, tensor by tensor, and what it costs.  The step is not computed.

    python tests/lab/dry_run.py --modality s1
    python tests/lab/dry_run.py --modality rgb --data PACK --method pera --arch vit_large

Takes pretrain.py's flags, and makes the toy world if there is no --data, as pretrain.py does.  The
step runs on the meta device, where tensors have a shape and no numbers.  Printed are: the preset;
the parameters of each part; each line of pretrain.py, losses.py and model.py that gives names to
tensors, with their shapes on its left; the operations of products and convolutions.  Read it beside
the ten lines of each method in the README; comments behind the lines say what the axes are.
"""
import linecache
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import pretrain  # noqa: E402

# functions that would say little: one rank has all draws, the others stand within a line
SILENT = ("of_this_rank", "<listcomp>", "<genexpr>", "<dictcomp>", "<lambda>")


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
    """Collects the lines of some files that make tensors, as text, indented as calls are nested.

    A line that comes again with the same shapes is left out: the blocks of a ViT are shown once.
    """

    def __init__(self, *modules):
        self.files = [module.__file__ for module in modules]
        self.texts = []
        self.depth = 0
        self.heads = []         # "in f:" of open calls, not among the texts yet

    def begin_call(self, frame, event, _):
        """Python calls this when a function begins.  Returns what it shall call for each line."""
        code = frame.f_code
        if code.co_filename not in self.files or code.co_name in SILENT:
            return None
        self.heads.append(self.describe(shapes_of_new({}, frame), f"in {code.co_qualname}:"))
        self.depth += 1
        before = dict(frame.f_locals)
        number = frame.f_lineno

        def end_line(frame, event, _):
            """Python calls this before each line and at the end: line `number` has just run."""
            nonlocal before, number
            source = linecache.getline(code.co_filename, number)
            self.add(shapes_of_new(before, frame), " ".join(source.split()))
            before = dict(frame.f_locals)
            number = frame.f_lineno
            if event == "return":
                self.depth -= 1
                del self.heads[-1:]                            # if it is still there
            return end_line
        return end_line

    def describe(self, made, source):
        return f"{'  ' * self.depth + ', '.join(made):<64} {source}"

    def add(self, made, source):
        text = self.describe(made, source)
        if made and text not in self.texts:
            self.texts += [*self.heads, text]
            self.heads.clear()


def shapes_of_new(before, frame):
    """The tensors among a call's variables that are others than `before`."""
    made = []
    for name, value in frame.f_locals.items():
        if before.get(name) is not value:
            made += shapes(name, value)
    return made


def trace_step(net, x, y, args):
    """One micro-batch, forward and backward -> (lines of text, number of operations)."""
    draws = pretrain.StepRandomness(args.seed, step=0, micro=0, rank=0, world=1)
    values = pretrain.schedules(args, step=0, total=100)
    tracer = Tracer(pretrain, losses, models)
    debugger = sys.gettrace()
    with FlopCounterMode(display=False) as counter:
        sys.settrace(tracer.begin_call)
        try:
            result = pretrain.STEPS[args.method](net, x, y, args, draws, values)
        finally:
            sys.settrace(debugger)
        result.loss.backward()
    return tracer.texts, counter.get_total_flops()


def millions(module):
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    # a run that lies in --out does not matter, and the meta device knows no autocast
    args = pretrain.resolve_flags([*argv, "--resume", "--amp", "off"])
    print(pretrain.describe_run(args, {}))
    pack = args.pack
    scenes = args.batch_size // args.accum
    views = pretrain.VIEWS[args.method]
    with torch.device("meta"):
        net = pretrain.networks(args, torch.device("meta"), quiet=True)
        x = torch.empty(scenes, views, *pack.images.shape[1:], dtype=torch.uint8)
        y = torch.empty(scenes, views, len(pack.classes))

    for name, branch in (("student", net.student), ("teacher", net.teacher)):
        parts = [f"{part} {millions(module)}" for part, module in branch.named_children()]
        print(f"{name}: {millions(branch)} million parameters: {', '.join(parts)}")
    texts, operations = trace_step(net, x, y, args)
    print("what each line makes; lines that come again with the same shapes are left out:")
    print("\n".join(texts))
    print(f"operations: {operations / 1e12:.4g} TFLOP for {scenes} scenes, forward and backward")


if __name__ == "__main__":
    try:
        main()
    except (data.InputError, models.CheckpointError, OSError) as error:
        sys.exit(f"dry_run.py: error: {error}")
