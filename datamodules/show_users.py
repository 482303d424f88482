"""Figure of the users' images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from pl_personalize.datamodules.base import TaskIncrementalDataModule

_INCHES = 1.2
_MAX_LABEL = 20  # characters beside a row


def show_users(datamodule: TaskIncrementalDataModule, path: str | os.PathLike[str], images_per_user: int = 8) -> Path:
    """Plot a row of adapt images for each user, cycling through the tasks; requires matplotlib.

    Users with the same images get the same ones, which shows what distinguishes them. The label of a row is the user,
    with :meth:`~TaskIncrementalDataModule.about_user` if it is short.

    Args:
        datamodule: The benchmark.
        path: Image file to write.
        images_per_user: Number of images in a row.

    Returns:
        The path.

    Raises:
        ValueError: If ``images_per_user`` is not positive.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if images_per_user < 1:
        raise ValueError(f"images_per_user must be at least 1; got {images_per_user}.")
    users = datamodule.users
    figure = Figure(figsize=(1 + _INCHES * images_per_user, 0.4 + _INCHES * len(users)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(users), images_per_user, squeeze=False)
    for user, axes in zip(users, grid, strict=True):
        for column, axis in enumerate(axes):
            axis.set_xticks([])
            axis.set_yticks([])
            turn, task = divmod(column, len(datamodule.tasks))
            images, labels = datamodule.user_split(user, task)[0]
            if turn < len(labels):
                scene = datamodule.classes[task][int(labels[turn])]
                axis.set_title(f"{datamodule.tasks[task]}: {scene}", fontsize=6)
                axis.imshow(_viewable(images[turn]), cmap="gray", vmin=0, vmax=1)
        about = datamodule.about_user(user)
        axes[0].set_ylabel(f"{user}\n{about}" if 0 < len(about) <= _MAX_LABEL else user)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    return target


def _viewable(image: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Convert (channels, height, width) of any range to (height, width, channels) in [0, 1]."""
    values = image.float()
    if image.dtype == torch.uint8:
        values = values / 255
    else:
        values = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)
    return values.movedim(0, -1).squeeze(-1).numpy()
