"""A run of a study, and what can be replaced in it that no flag changes."""
import itertools
from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import torch

import data
import losses
import model as models
import pretrain

# ------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """One training and the probes of its backbone, or one measurement by another script."""
    flags: list                                   # of pretrain.py, or of script
    switch: Callable | None = None                # called before the run, replaces a function
    probes: list = field(default_factory=list)    # lists of flags of probe.py, one a probe
    amp: str = "bf16"
    train: bool = True                            # False: probe the files that the flags name
    script: Callable | None = None                # takes the flags, gives the line's results


def toy_run(modality, seed, flags, switch=None, probes=([],)):
    """A run of pretrain.py, by default on the toy world, with one default probe."""
    return Run(["--modality", modality, *flags, "--seed", str(seed)], switch, list(probes))


def run_folder(key):
    """Where the run leaves its checkpoint."""
    return f"runs/study/{key.replace(' ', '_')}"


# ------------------------------------------------------------------------------------ real chips


def chip_folder(modality, share, seed):
    """Where make_chips puts its links and lists."""
    return f"runs/study/chips/{modality}_{share}_{seed}"


def chip_probes(modality, share, seed, heads, features=("cls", "cls+mean")):
    """Each head on the first of the features, then each on the next."""
    folder = chip_folder(modality, share, seed)
    probes = []
    for feature, head in itertools.product(features, heads):
        probes.append([
            "--task", "eurosat", "--data", f"{folder}/all", "--modality", modality,
            "--lists", f"{folder}/fit.txt", f"{folder}/test.txt", "--feature", feature,
            "--protocol", head, "--bootstrap", "200", "--seed", str(seed), "--img-size", "64"])
    return probes


def link(files, folder):
    """Links to the files in a new folder."""
    folder.mkdir(parents=True)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())


# ------------------------------------------------------------------------- switches without a flag

# Each of these changes one thing that no flag changes, by replacing functions of the five files in
# the process of that one run.


def one_direction():
    """The loss is that of q1 against k2 alone: the mean (a + b) / 2 becomes (2 a + 0 b) / 2."""
    softcon_loss = losses.softcon_loss
    factors = itertools.cycle((2, 0))

    def weighted(*args, **keywords):
        factor = next(factors)
        return tuple(factor * part for part in softcon_loss(*args, **keywords))
    losses.softcon_loss = weighted


def no_predictor():
    """The student's query comes from the projector, as the teacher's key does."""
    branch = models.Branch

    def without_predictor(backbone, hidden, predict=False):
        return branch(backbone, hidden, False)
    models.Branch = without_predictor


def mean_over_labelled():
    """The soft term is a mean over the rows with labels, not over all rows."""
    soft_contrastive = losses.soft_contrastive

    def louder(q, k, yq, *others):
        labelled = losses.has_labels(yq).sum().clamp_min(1)
        return soft_contrastive(q, k, yq, *others) * len(yq) / labelled
    losses.soft_contrastive = louder


def labelled_only():
    """Images without labels do not take part at all."""
    open_data = data.open_data

    def open_labelled(*args, **keywords):
        scenes = open_data(*args, **keywords)
        ids = []
        files = []
        labels = []
        for i, name in enumerate(scenes.ids):
            labelled = np.flatnonzero(scenes.labels[i].any(1))
            if len(labelled) > 0:
                ids.append(name)
                files.append([scenes.files[i][s] for s in labelled])
                labels.append(scenes.labels[i][labelled])
        scenes.ids = ids
        scenes.files = files
        scenes.labels = labels
        return scenes
    data.open_data = open_labelled


def scattered():
    """The same share of cells is masked, each drawn by itself instead of in blocks."""
    def mask(batch, grid, ratio, generator=None):
        cells = grid[0] * grid[1]
        order = torch.rand(batch, cells, generator=generator).argsort(1)
        return order[:, round(ratio * cells):].sort(1).values
    losses.block_mask = mask


def no_vertical_flip():
    """Views are flipped left to right only."""
    draw_crops = data.draw_crops

    def draw_unflipped(n, *args, **keywords):
        crops = draw_crops(n, *args, **keywords)
        crops["flip_y"] = torch.ones(n)
        return crops
    data.draw_crops = draw_unflipped


def betas():
    """AdamW has its usual betas (0.9, 0.999)."""
    adamw = torch.optim.AdamW

    def usual_adamw(groups, **keywords):
        keywords["betas"] = (0.9, 0.999)
        return adamw(groups, **keywords)
    torch.optim.AdamW = usual_adamw


def decay_everything():
    """Norms and biases decay, too."""
    adamw = torch.optim.AdamW

    def decaying_adamw(groups, **keywords):
        parameters = []
        for group in groups:
            parameters += group["params"]
        nothing = {"params": [], "weight_decay": 0}            # training asks for two groups
        return adamw([{"params": parameters}, nothing], **keywords)
    torch.optim.AdamW = decaying_adamw


def small_layerscale():
    """LayerScale starts from 1e-5, as DINOv2 was trained."""
    class SmallLayerScale(models.LayerScale):
        def __init__(self, dim):
            super().__init__(dim)
            torch.nn.init.constant_(self.gamma, 1e-5)
    models.LayerScale = SmallLayerScale


def one_offset():
    """VV and VH are offset by the same decibels."""
    draw_colours = data.draw_colours

    def draw_together(n, sensor, *args, **keywords):
        drawn = draw_colours(n, sensor, *args, **keywords)
        std = torch.tensor(sensor.std)
        drawn["offset"] = drawn["offset"][:, :1] * (std[0] / std)
        return drawn
    data.draw_colours = draw_together


def as_optical():
    """Radar images change in brightness and contrast, as optical ones do."""
    draw_colours = data.draw_colours

    def draw_optical(n, sensor, *args, **keywords):
        return draw_colours(n, data.SENSORS["s2c"], *args, **keywords)
    data.draw_colours = draw_optical


def thaw():
    """In the first tenth of the steps only a ViT's patch embedding and the heads learn."""
    schedules = pretrain.schedules
    adamw_step = torch.optim.AdamW.step
    make_networks = pretrain.networks
    trunk = []                                    # what stays
    frozen = True

    def networks(*args, **keywords):
        net = make_networks(*args, **keywords)
        for name, parameter in net.student.backbone.named_parameters():
            if not name.startswith("patch_embed"):
                trunk.append(parameter)
        return net

    def watched_schedules(args, step, total):
        nonlocal frozen
        frozen = step < 0.1 * total
        return schedules(args, step, total)

    def step_without_trunk(self, *args, **keywords):
        if frozen:
            for parameter in trunk:
                parameter.grad = None             # AdamW passes over it
        return adamw_step(self, *args, **keywords)
    pretrain.networks = networks
    pretrain.schedules = watched_schedules
    torch.optim.AdamW.step = step_without_trunk
