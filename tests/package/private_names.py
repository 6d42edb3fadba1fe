"""The private names of torch, Lightning, Accelerate and DeepSpeed that this project reads, and why.

Each may move or disappear in any release. ``test_private_names.py`` checks that each exists and that none is missing
here. ``pytorch_lightning`` has the code of ``lightning.pytorch``, so its names are not listed again.
"""

from __future__ import annotations

from dataclasses import dataclass

FIND = (
    "Find in the release notes or the source of {library} what replaces it; read that if it exists and otherwise the "
    "old name, or do without; then correct tests/package/private_names.py"
)


@dataclass(frozen=True)
class Private:
    """A name that another package does not promise to keep.

    Attributes:
        owner: import path of the module or class that has it.
        name: the attribute of ``owner``; with dots if an attribute of it is read, too.
        where: files that read it.
        why: text that continues "reads it in order to".
        made_by: a function of ``private_objects.py`` that builds an object with the name. None: ``owner`` has it.
        since: the first version of the library in which it is read; earlier ones use something else.
        until: the first version in which it is no longer read.
        needs: packages needed to look it up, besides the library itself.
        cure: what to do when it has disappeared.
    """

    owner: str
    name: str
    where: tuple[str, ...]
    why: str
    made_by: str | None = None
    since: str | None = None
    until: str | None = None
    needs: tuple[str, ...] = ()
    cure: str = FIND

    @property
    def library(self) -> str:
        return self.owner.partition(".")[0]

    @property
    def key(self) -> str:
        return f"{self.owner}.{self.name}"

    @property
    def read_as(self) -> str:
        """Return what the code contains: the name, or the private module that a public name is imported from."""
        first = self.name.partition(".")[0]
        parts = [part for part in self.owner.split(".") if part.startswith("_")]
        return first if first.startswith("_") or not parts else parts[-1]


_CONVERT = "am_lightning/optim/convert.py"
_FSDP1 = "am_lightning/distributed/strategies/fsdp1.py"
_DTENSOR = "am_lightning/distributed/strategies/dtensor.py"
_FACTORY = "am_lightning/optim/param_groups.py"
_NAMES = "am_lightning/distributed/names.py"
_HUGGINGFACE = "am_lightning/huggingface/accelerate.py"
_CALLBACK = "am_lightning/pretrain/checkpoints/callback.py"
_WRITER = "am_lightning/pretrain/checkpoints/writer.py"
_FAULTS = "am_lightning/pretrain/callbacks/fault_tolerance.py"
_COLLECTIVES = "am_lightning/pretrain/runtime/collectives.py"
_SETTINGS = "am_lightning/pretrain/runtime/run_config.py"
_BOARD = "am_lightning/pretrain/callbacks/tensorboard.py"
_PATCHES = "am_lightning/lightning/trainer_patches.py"
_STORE = "am_lightning/optim/state_store.py"
_WEIGHTS = ("am_lightning/pretrain/checkpoints/weights.py",)
_PACKS = "am_lightning/optim/kernels/buckets.py"

_OPTIMIZER = "torch.optim.Optimizer"
_MODULE = "torch.distributed.fsdp.FullyShardedDataParallel"
_FLAT = "torch.distributed.fsdp.FlatParameter"
_MESH = "torch.distributed.device_mesh"
_C10D = "torch.distributed.distributed_c10d"
_DCP = "torch.distributed.checkpoint"
_DESCRIBED = "take it, and nothing that runs code, out of the pickle that describes shards"
_WITHOUT_PREFIX = "strip it from the names of parameters, which would otherwise differ between wrappers"

TORCH = [
    Private(_OPTIMIZER, "_accelerator_graph_capture_health_check", ("am_lightning/optim/base.py",),
            "refuse a step in a captured graph without capturable=True", since="2.11"),
    Private(_OPTIMIZER, "_cuda_graph_capture_health_check", ("am_lightning/optim/base.py",),
            "refuse a step in a captured graph without capturable=True", until="2.11"),
    Private(_OPTIMIZER, "_patch_step_function", (_CONVERT,),
            "wrap step() of a converted AdamW in torch's hooks and profiling"),
    Private(_OPTIMIZER, "_optimizer_load_state_dict_post_hooks", ("am_lightning/loggers/step_logger.py",),
            "find the log that attach() has put on this optimizer before", "optimizer"),
    Private("torch.optim.AdamW", "_step_supports_amp_scaling", (_CONVERT,),
            "take it away from a converted fused AdamW, so that GradScaler unscales before step()", "fused_adamw"),
    Private("torch.optim.lr_scheduler.LRScheduler", "_wrapped_by_lr_sched", (_CONVERT,),
            "tell a scheduler's wrapper of step() from a user's, and to mark its successor", "scheduled_step"),
    Private("torch.optim.lr_scheduler.LRScheduler", "_opt_called", (_CONVERT,),
            "tell the scheduler that the optimizer has stepped before it", "stepped_optimizer"),
    Private("torch.optim.lr_scheduler.LRScheduler", "_with_counter", (_CONVERT,),
            "recognise the wrapper of step() by other schedulers that follow torch's of that time", until="2.5"),
    Private("torch.optim.lr_scheduler.LRScheduler", "_step_count", (_CONVERT,),
            "count steps for such a scheduler", until="2.5"),
    Private("torch.optim.lr_scheduler.LRScheduler", "_last_lr", ("am_lightning/pretrain/model/schedule.py",),
            "give a resume its own learning rate: get_last_lr() returns it before the first step", "scheduler"),
    Private("torch.distributed.checkpoint.state_dict", "_init_optim_state.__code__",
            ("am_lightning/distributed/call_stack.py",),
            "recognise the step at lr 0 that only creates a state and must leave no trace"),
    Private(f"{_DCP}.filesystem", "_StorageInfo", _WEIGHTS, _DESCRIBED),
    Private(f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING", _WEIGHTS, _DESCRIBED),
    Private("torch.serialization", "_get_layout", _WEIGHTS, _DESCRIBED),
    Private(_MESH + ".DeviceMesh", "_flatten", (_DTENSOR,), "have one process group for a mesh of several dimensions"),
    Private(_MESH + ".DeviceMesh", "_get_root_mesh", (_DTENSOR,),
            "cover several meshes by one, so that one all-reduce is enough for all sums", since="2.10"),
    Private(_MESH, "_mesh_resources.get_root_mesh", (_DTENSOR,),
            "cover several meshes by one, so that one all-reduce is enough for all sums", until="2.10"),
    Private("torch.distributed.tensor.placement_types", "_StridedShard", (_DTENSOR,),
            "recognise FSDP2's placement of a dimension that tensor parallelism has split already"),
    Private(_MODULE, "_handle", (_FSDP1,), "reach the flat parameter of an FSDP1 module", "fsdp1"),
    Private(_FLAT, "_params", (_FSDP1,),
            "reach the parameters that use_orig_params=True shows", "flat_parameter"),
    Private(_FLAT, "_shapes", (_FSDP1,), "give norms and biases no weight decay", "flat_parameter"),
    Private(_FLAT, "_fqns", (_FSDP1,), "name the tensors in a flat parameter", "flat_parameter"),
    Private(_FLAT, "_numels", (_FSDP1,), "check that the shards add up to each tensor", "flat_parameter"),
    Private(_FLAT, "_param_extensions", (_FSDP1,), "refuse tensor parallelism below FSDP1", "flat_parameter"),
    Private(_FLAT, "_shard_param_infos", (_FSDP1,),
            "find each tensor's elements in this rank's shard", "flat_parameter"),
    Private(_FLAT, "_fsdp_flattened", (_FSDP1,),
            "recognise a parameter of FSDP1, which looks like a whole tensor", "flat_parameter"),
    Private(_MODULE, "_inter_node_pg", (_FSDP1,), "add up over the copies that HYBRID_SHARD keeps", "hybrid_fsdp1"),
    Private(_MODULE, "_fsdp_wrapped_module", (_NAMES,), _WITHOUT_PREFIX, "fsdp1"),
    Private("torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper",
            "_checkpoint_wrapped_module", (_NAMES,), _WITHOUT_PREFIX, "checkpoint_wrapper"),
    Private("torch._dynamo.OptimizedModule", "_orig_mod", (_NAMES,), _WITHOUT_PREFIX, "compiled_module"),
    Private(_C10D, "_world.pg_map", (_COLLECTIVES,), "list the process groups: hang_timeout_s applies to each"),
    Private(_C10D, "_set_pg_timeout", (_COLLECTIVES,), "give hang_timeout_s to the groups of device meshes"),
    Private("torch._dynamo", "config.patch", ("am_lightning/optim/kernels/compiled.py",),
            "raise the number of graphs of one function"),
    Private("torch.utils.cpp_extension", "_get_build_directory", ("am_lightning/pretrain/runtime/operator_build.py",),
            "log that DeepSpeed compiles its operator, if it is not compiled yet"),
    Private("torch.utils.tensorboard.SummaryWriter", "_get_file_writer",
            (_BOARD, "am_lightning/loggers/custom_scalars.py"),
            "write the HParams row, and charts of several curves, into the run's own event file",
            needs=("tensorboard",)),
    Private("torch", "_foreach_norm", ("am_lightning/optim/squares.py",),
            "norms of many tensors in one launch"),
    Private("torch", "_foreach_mul_", ("am_lightning/optim/kernels/inputs.py",), "scale many tensors in one launch"),
    Private("torch", "_foreach_copy_", (_PACKS, _STORE), "write many tensors in one launch"),
]  # fmt: skip

_LOOP = "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop"
_TRAINER = "lightning.pytorch.Trainer"
_CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
_CLI = "lightning.pytorch.cli.LightningCLI"
_STRATEGIES = "lightning.pytorch.strategies."

LIGHTNING = [
    Private(_LOOP, "_batches_that_stepped", ("am_lightning/lightning/callback.py",),
            "log on the axis of the Trainer's own metrics", "epoch_loop"),
    Private(_LOOP, "_is_training_done", ("am_lightning/pretrain/callbacks/progress.py",),
            "draw the bar after the last batch", "epoch_loop"),
    Private(_LOOP, "_broadcast_sigterm_tensor", (_FAULTS,),
            "replace Lightning's agreement on a signal by our own", "epoch_loop"),
    Private(_TRAINER, "_checkpoint_connector.resume_start", (_CALLBACK,),
            "resume from the checkpoint that rank 0 has chosen", "trainer"),
    Private(_TRAINER, "_checkpoint_connector.dump_checkpoint", (_WRITER,),
            "make the content of a checkpoint, which another thread may write", "trainer"),
    Private(_TRAINER, "_signal_connector.register_signal_handlers", (_FAULTS,),
            "keep our own handlers of signals", "trainer"),
    Private("lightning.pytorch.LightningModule", "_trainer", (_FACTORY,),
            "find the FSDP module around a LightningModule", "lightning_module"),
    Private("lightning.fabric.wrappers._FabricModule", "_forward_module", ("am_lightning/lightning/fabric.py", _NAMES),
            "reach the DeepSpeed engine, and to strip it from the names of parameters", "fabric_module"),
    Private("lightning.pytorch.callbacks.LearningRateMonitor", "_extract_momentum", (_PATCHES,),
            "show beta_t instead of the cap as the momentum"),
    Private(_CHECKPOINT, "_should_skip_saving_checkpoint", (_CALLBACK,), "save no step twice"),
    Private(_CHECKPOINT, "_save_topk_checkpoint", (_CALLBACK,), "save at the end of a run"),
    Private(_CHECKPOINT, "_monitor_candidates", (_CALLBACK,), "save at the end of a run"),
    Private(_CHECKPOINT, "_save_checkpoint", (_CALLBACK,), "override it: a checkpoint is complete or absent"),
    Private(_CHECKPOINT, "_find_last_checkpoints", (_CALLBACK,),
            "override it: ckpt_path='last' means the newest complete one"),
    Private(_CHECKPOINT, "_last_global_step_saved", (_CALLBACK,), "set it, so that no step is saved twice",
            "model_checkpoint"),
    Private(_CHECKPOINT, "_last_checkpoint_saved", (_CALLBACK,), "set it, as Lightning's own saving does",
            "model_checkpoint"),
    Private(_CLI, "_parse_ckpt_path", ("am_lightning/pretrain/runtime/cli.py",),
            "override it: the command line takes precedence over a checkpoint's hyperparameters"),
    Private(_CLI, "_dump_config", (_SETTINGS,), "have the settings as plain values"),
    Private(_CLI, "_set_seed", (_SETTINGS,), "override it: a program that only reads settings seeds nothing"),
    Private(_CLI, "_run_subcommand", (_SETTINGS,), "override it: a program that only reads settings runs nothing"),
    Private(_STRATEGIES + "DeepSpeedStrategy", "_init_optimizers", ("am_lightning/lightning/callback.py",),
            "convert an optimizer before DeepSpeed's engine is built around it"),
    Private(_STRATEGIES + "ModelParallelStrategy", "_save_distributed_checkpoint", (_WRITER,),
            "know whether a checkpoint is a folder", "model_parallel_strategy"),
    Private(_STRATEGIES + "FSDPStrategy", "_state_dict_type", (_WRITER,),
            "know whether a checkpoint is a folder", "fsdp_strategy"),
    Private(_STRATEGIES + "DDPStrategy", "_timeout", (_FAULTS,), "set hang_timeout_s before the group starts",
            "ddp_strategy"),
    Private(_STRATEGIES + "FSDPStrategy", "_timeout", (_FAULTS,), "set hang_timeout_s before the group starts",
            "fsdp_strategy"),
    Private(_STRATEGIES + "ModelParallelStrategy", "_timeout", (_FAULTS,), "set hang_timeout_s before the group starts",
            "model_parallel_strategy"),
]  # fmt: skip

ACCELERATE = [
    Private("accelerate.Accelerator", "_models", (_HUGGINGFACE,), "find the models that were prepared", "accelerator"),
    Private("accelerate.Accelerator", "_optimizers", (_HUGGINGFACE,), "refuse an optimizer that was not prepared",
            "accelerator"),
]  # fmt: skip

_IMAGES = ("am_lightning/huggingface/images.py",)
_RUN = "give the picture of the layers to the run that the reporting callback writes to"
_REPORTERS = {
    "WandbCallback": ("_wandb", "wandb"),
    "MLflowCallback": ("_ml_flow", "mlflow"),
    "CometCallback": ("_experiment", "comet_ml"),
    "ClearMLCallback": ("_clearml_task", "clearml"),
    "TrackioCallback": ("_trackio", "trackio"),
    "SwanLabCallback": ("_swanlab", "swanlab"),
    "NeptuneCallback": ("_run", "neptune"),
}

TRANSFORMERS = [
    Private(f"transformers.integrations.{owner}", name, _IMAGES, _RUN, owner, needs=(package,))
    for owner, (name, package) in _REPORTERS.items()
] + [
    Private("transformers.integrations.WandbCallback", "_initialized", _IMAGES,
            "skip a callback without a run, because its module would begin one", "WandbCallback", needs=("wandb",)),
]  # fmt: skip

TIMM = [
    Private("timm.optim._optim_factory", "default_registry", ("am_lightning/clients/timm.py",),
            "register amadamw and amsgd among timm's optimizers"),
]  # fmt: skip

LITDATA = [
    Private("litdata.streaming.downloader", "_OBSTORE_CLIENT_OPTIONS",
            ("am_lightning/pretrain/data/litdata_loader.py",),
            "let obstore read a server without TLS if AWS_ALLOW_HTTP permits it"),
]  # fmt: skip
