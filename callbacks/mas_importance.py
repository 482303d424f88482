"""Memory Aware Synapses importances at the end of a run."""

from __future__ import annotations

from pl_personalize.callbacks.importance_callback import ImportanceCallback


class MASImportance(ImportanceCallback):
    r"""Estimates MAS importances at the end of ``fit``, or on the data of a ``predict`` run.

    The mean over samples of :math:`|\partial \|f(x)\|_2^2 / \partial \theta|` (Aljundi et al., ECCV 2018), exact per
    sample; it needs no labels. Add it to any Trainer::

        trainer = Trainer(callbacks=[MASImportance()])
        trainer.fit(model, train_dataloader)  # afterwards: callback.importance, callback.path

    or, for a user's unlabelled images, without training::

        Trainer(callbacks=[callback]).predict(model, dataloader)

    The result is a safetensors file (:class:`~pl_personalize.Importance`), and a summary in the Trainer's loggers. The
    batches are those that the loaders yield; under DDP each process reads a share, and all end with the same
    importances (docs/passes.md).

    Args:
        dataloader: The data for ``fit``: an iterable of batches, or a sequence of DataLoaders; or the name of a stage
            (``"train"``, ``"val"``, ``"test"``, ``"predict"``) or several, whose dataloaders the datamodule (after
            ``setup``) or else the module provides; ``None``: the train loaders. A ``predict`` run reads what is
            predicted, unless batches or loaders are passed.
        weights: For ``fit``: the weights of the ``"best"`` checkpoint of a ModelCheckpoint that monitors a metric, if
            there is one, or the ``"last"``. The module keeps the last ones.
        module: Submodule whose parameters count; names are relative to it.
        exclude: Names of parameters or modules to leave out.
        forward: ``(module, batch) -> logits``, if calling the module on the input is not enough.
        dirpath: Folder of the file; by default ``importances`` in the first logger's folder, else in the Trainer's
            ``default_root_dir``.
        filename: Name of the file without extension; by default the kind of importance.
        reduction: See :func:`~pl_personalize.estimate_importance`.
        max_scratch_mb: See :func:`~pl_personalize.estimate_importance`.

    Attributes:
        importance: The result; raises before there is one.
        path: Its file; ``None`` after a trial run (``fast_dev_run``), which writes none.

    Raises:
        MisconfigurationException: In ``setup``, for a Trainer of ``pytorch_lightning``, a strategy that shards
            parameters (FSDP, DeepSpeed), a stage without dataloader, or an unknown module; before the first step, for
            data or a folder that cannot be used.
    """

    kind = "mas"
