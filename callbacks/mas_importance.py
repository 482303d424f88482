"""Memory Aware Synapses importances at the end of a run."""

from __future__ import annotations

from pl_personalize.callbacks.importance_callback import ImportanceCallback


class MASImportance(ImportanceCallback):
    r"""Estimates MAS importances when ``fit`` ends, or over the data of a ``predict`` run.

    The mean over samples of :math:`|\partial \|f(x)\|_2^2 / \partial \theta|` (Aljundi et al., ECCV 2018), exact per
    sample; it needs no labels. Add it to any Trainer::

        trainer = Trainer(callbacks=[MASImportance()])
        trainer.fit(model, train_dataloader)  # afterwards: callback.importance, callback.path

    and for a user's unlabelled images, without any training::

        Trainer(callbacks=[callback]).predict(model, dataloader)

    The result is a safetensors file (:class:`~pl_personalize.Importance`), and a summary in the Trainer's loggers.
    The batches are those that the loaders yield; under DDP each process takes a part of them, without repetition, and
    all end with the same importances (docs/passes.md).

    Args:
        dataloader: The data for ``fit``: an iterable of batches; the name of a stage (``"train"``, ``"val"``,
            ``"test"``, ``"predict"``), or several, whose dataloaders the datamodule (after ``setup`` for it) or the
            module provides; or ``None``: what the train loader yields in an epoch.
        weights: For ``fit``: ``"best"`` uses the weights of the best checkpoint of a ModelCheckpoint that monitors a
            metric, where there is one, and puts the last ones back; ``"last"`` does not.
        module: Submodule whose parameters count; names are relative to it.
        exclude: Names of parameters or modules that do not count.
        forward: ``(module, batch) -> logits`` where calling the module on the input is not enough.
        dirpath: Folder of the file; by default ``importances`` in the first logger's folder, else in the Trainer's
            ``default_root_dir``.
        filename: Name of the file without ending; by default the kind.
        reduction: See :func:`~pl_personalize.estimate_importance`.
        max_scratch_mb: See there.

    Attributes:
        importance: The result; there is an error before there is one.
        path: Its file; ``None`` after a trial run (``fast_dev_run``), which leaves none.

    Raises:
        MisconfigurationException: In ``setup``, for a Trainer of ``pytorch_lightning``, a strategy that shards
            parameters (FSDP, DeepSpeed), a stage without dataloader, or a module that does not exist; before the first
            step, for what two samples or the folder show.
    """

    kind = "mas"
