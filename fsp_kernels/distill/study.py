"""A recipe in its folder: the teacher, and students trained in as many ways as are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fsp_kernels.distill import checkpoint, records
from fsp_kernels.distill.arms import ARMS, Stage
from fsp_kernels.distill.checkpoint import Series
from fsp_kernels.distill.config import Config, Data, Network, Training, dump_config
from fsp_kernels.distill.data import Split, Splits, check_batch_size, load_splits
from fsp_kernels.distill.environment import describe_environment
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.evaluation import Evaluations
from fsp_kernels.distill.interruption import Interruption
from fsp_kernels.distill.job import Job
from fsp_kernels.distill.models import build_model, load_weights, parameter_count
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.pairs import check_pairs, resolve_pairs
from fsp_kernels.distill.records import MODEL, Phase, Run
from fsp_kernels.distill.settings import to_tree
from fsp_kernels.distill.storage import (
    check_writable,
    is_in_use,
    lock,
    remove_unfinished,
    require_agreement,
    write_text,
)
from fsp_kernels.distill.teacher import LiveTeacher, Teacher, cached
from fsp_kernels.distill.train import Trainer

MARKER = "config.yaml"
TEACHER, SOURCE = "teacher", "source"


class Study:
    """One recipe in one folder, from nothing or from wherever an earlier process was.

    Opening it checks all that can be checked before training and changes nothing if a check fails.
    A folder that does not exist, is empty, or was made by this program is used. The networks that
    the source and the teacher became are used again if they were trained under the same settings.

    Args:
        config: the recipe.
        folder: for all that it makes.
        monitor: is told.
        interruption: is asked after each step whether to stop.
        resume: ``True`` goes on with unfinished networks and keeps finished ones, ``False`` begins
            again, ``None`` begins again unless a network is unfinished, which is an error.

    Raises:
        DistillError: the recipe does not fit its data or networks; ``folder`` holds other things,
            can't be written to or has no space; something in it is unfinished.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        monitor: Monitor,
        interruption: Interruption,
        resume: bool | None = None,
    ) -> None:
        self.config, self.folder, self.monitor, self._resume = config, folder, monitor, bool(resume)
        check_folder(folder, resume)
        self.trainer = Trainer(config, monitor, interruption)
        self._accelerator = self.trainer.accelerator
        self.splits = load_splits(config.data, say=monitor.say)
        self.source_splits = self._load_source()
        with self._accelerator.local_main_process_first():  # what is downloaded, is so once
            needed = self._check_networks()
        self._check_sets()
        self._accelerator.wait_for_everyone()  # to have checked the folder as it was
        if self._accelerator.is_main_process:
            check_writable(folder, needed)
            self._lock = lock(folder)
            remove_unfinished(folder)
            write_text(folder / MARKER, dump_config(config))
        self._accelerator.wait_for_everyone()

    @cached_property
    def teacher(self) -> LiveTeacher:
        """The teacher: as given, from an earlier process's folder, or trained now."""
        config, seed, training = self.config, self.config.teacher_seed, self.config.teacher_training
        network = self.trainer.new_network(config.teacher, self.splits, seed, TEACHER)
        if self.source_splits is not None:
            load_weights(network, self._source(self.source_splits).state_dict(), SOURCE)
        job = self._job(TEACHER, seed, training, config.data, self.splits)
        self._done(job, network, self._plain, reuse=True)
        return LiveTeacher(network, self.pairs, self._accelerator, config.execution.compile)

    def student(self, arm: str, seed: int) -> Run:
        """Train one student, or find it trained already when resuming.

        All arms of one seed share the initial weights and, as far as they go, the order of images
        on the task loss.

        Args:
            arm: a key of ``ARMS``; the teacher is trained first if the arm needs it.
            seed: of the initial weights, the order of images and their augmentation.

        Raises:
            DistillError: a loss is no longer finite; something can't be written; the folder holds
                this student under other settings, and it was to be resumed.
            InterruptedRunError: by a signal; what there was is saved.
        """
        config, stages = self.config, self.stages(arm)
        distilled = any(stage.needs_teacher for stage in stages)
        # The teacher may take all the steps it takes to train before there is a student.
        evaluations = self._distilled if distilled else self._plain
        teacher = self._answers if distilled else None
        names = ("data", "student", "stage1", "stage2", "kd", "fsp", "execution", "evaluation")
        settings = self._settings(*names) | {
            "weights": _file_of(config.student),
            "images": [self.splits.train.fingerprint, self.splits.test.fingerprint],
        }
        if distilled:
            settings["teacher"] = checkpoint.digest_of(self.teacher.network.state_dict())
            settings["pairs"] = to_tree(self.pairs)
        job = Job(
            arm=arm,
            label=f"{arm} seed {seed}",
            network=config.student,
            seed=seed,
            stages=stages,
            data=config.data,
            images=self.splits.train,
            folder=self.folder_of(arm, seed),
            fingerprint=checkpoint.fingerprint({**settings, "arm": arm, "seed": seed}),
            pairs=self.pairs if distilled else (),
            shapes=self.shapes if distilled else (),
        )
        network = self.trainer.new_network(config.student, self.splits, seed, "student")
        return self._done(job, network, evaluations, reuse=self._resume, teacher=teacher)

    def folder_of(self, arm: str, seed: int) -> Path:
        """Where a student is kept."""
        return self.folder / arm / f"seed-{seed}"

    def all(self) -> list[Run]:
        """The recipe's arms for each of its seeds; the teacher first."""
        _ = self.teacher
        return [self.student(arm, seed) for seed in self.config.seeds for arm in self.config.arms]

    def stages(self, arm: str) -> tuple[Stage, ...]:
        """The stages of ``arm`` and the steps they take."""
        return ARMS[arm].stages(self.config, _counter(self.config.data, self.splits.train))

    @cached_property
    def _distilled(self) -> Evaluations:
        return Evaluations(self.splits, self.trainer.setup, self.teacher)

    @cached_property
    def _answers(self) -> Teacher:
        if not self.config.fsp.cache_teacher:
            return self.teacher
        folder = self.folder / TEACHER / "cache"
        return cached(self.teacher, self.splits.train, self.config, self._accelerator, folder)

    @cached_property
    def _plain(self) -> Evaluations:
        return Evaluations(self.splits, self.trainer.setup)

    def _load_source(self) -> Splits | None:
        source = self.config.source
        if source is None:
            return None
        return load_splits(source.data, "source.data", self.splits, self.monitor.say)

    def _source(self, splits: Splits) -> nn.Module:
        """The teacher as its source data leave it."""
        source = self.config.source
        assert source is not None
        seed = self.config.teacher_seed
        network = self.trainer.new_network(self.config.teacher, splits, seed, TEACHER)
        job = self._job(SOURCE, seed, source.training, source.data, splits)
        self._done(job, network, Evaluations(splits, self.trainer.setup), reuse=True)
        return network

    def _settings(self, *names: str) -> dict[str, Any]:
        """These sections of the recipe, but for where the images are: they tell what they are."""
        tree = to_tree(self.config)
        for section in (tree["data"], *([tree["source"]["data"]] if tree["source"] else ())):
            for key in ("root", "download", "corrupt", "workers"):
                del section[key]
        return {name: tree[name] for name in names}

    def _job(
        self, arm: str, seed: int, training: Training | None, data: Data, splits: Splits
    ) -> Job:
        """The teacher's training, if it has any, or its training on the source before."""
        names = ("data", "teacher", "teacher_training", "source", "execution", "evaluation")
        settings = self._settings(*names)
        if arm == SOURCE:  # what comes after it is nothing to it
            settings |= {"data": None, "teacher_training": None}
        settings |= {"weights": _file_of(self.config.teacher), "arm": arm, "seed": seed}
        settings["images"] = [splits.teacher_train.fingerprint, splits.test.fingerprint]
        images = splits.teacher_train
        stages: tuple[Stage, ...] = ()
        if training is not None:
            stages = (Stage("task", training, _counter(data, images)(training)),)
        return Job(
            arm=arm,
            label=arm,
            network=self.config.teacher,
            seed=seed,
            stages=stages,
            data=data,
            images=images,
            folder=self.folder / arm,
            fingerprint=checkpoint.fingerprint(settings),
        )

    def _done(
        self,
        job: Job,
        network: nn.Module,
        evaluations: Evaluations,
        reuse: bool,
        teacher: Teacher | None = None,
    ) -> Run:
        """Make of ``network`` what ``job`` asks for: train it, or ``reuse`` what was trained."""
        run = self._earlier(job, network) if reuse else None
        # By now all have read what there is, so it may go.
        require_agreement(run is not None, job.folder)
        if run is not None:
            if self._accelerator.is_main_process:  # which may have been killed before it did this
                Series(job.folder / "checkpoints", self.config.checkpoints.keep).clear()
            self._say(job, run, "reused")
            return run
        if self._accelerator.is_main_process:
            self._clear(job)
        self._accelerator.wait_for_everyone()
        if job.stages:
            phases = self.trainer.train(job, network, evaluations, teacher, self._resume)
        else:
            figures = evaluations.task()(network.eval())
            evaluations.close()
            phases = [Phase("as given", [], [{"step": 0, **figures}], 0.0, False)]
        run = Run(
            arm=job.arm,
            seed=job.seed,
            network=job.network.model,
            parameters=parameter_count(network),
            phases=phases,
            fingerprint=job.fingerprint,
            config=to_tree(self.config),
            environment=describe_environment(self._accelerator.device),
        )
        if self._accelerator.is_main_process:
            note = {"fingerprint": job.fingerprint}
            checkpoint.save(job.folder / MODEL, network.state_dict(), note)
            records.write(run, job.folder)
            Series(job.folder / "checkpoints", self.config.checkpoints.keep).clear()
        self._accelerator.wait_for_everyone()
        self._say(job, run, f"{run.seconds:.1f} s")
        return run

    def _earlier(self, job: Job, network: nn.Module) -> Run | None:
        """What an earlier process made of the same job, loaded into ``network``."""
        if not records.is_finished(job.folder):
            return None
        try:
            run, path = records.read(job.folder), job.folder / MODEL
            if run.fingerprint == job.fingerprint:
                checkpoint.restore(network, checkpoint.load(path), path)
                return run
        except DistillError as error:
            self.monitor.say(f"{error}; training it anew")
            return None
        if job.arm not in (TEACHER, SOURCE):
            raise DistillError(
                f"{job.folder}: was trained under other settings than these, so it can't be "
                f"resumed; --restart begins again"
            )
        self.monitor.say(f"{job.folder}: of other settings; training the {job.arm} anew")
        return None

    def _clear(self, job: Job) -> None:
        """Of an earlier run nothing may stay that this one could be taken for."""
        job.folder.mkdir(parents=True, exist_ok=True)
        for name in (records.RECORD, MODEL):
            (job.folder / name).unlink(missing_ok=True)
        if not self._resume:  # an unfinished run may be in its second stage, these are of the first
            (job.folder / records.MATRICES).unlink(missing_ok=True)
            Series(job.folder / "checkpoints", self.config.checkpoints.keep).clear()

    def _say(self, job: Job, run: Run, how: str) -> None:
        split = self.config.evaluation.split
        self.monitor.say(f"{job.label}: {split} accuracy {run.accuracy:.2%}, {how}")

    def _check_networks(self) -> int:
        """Sets ``pairs`` and ``shapes``; the bytes that the study may come to take on its disk."""
        config, image = self.config, self.splits.test[0].image[None]
        student, teacher = (
            build_model(
                network, in_channels=image.shape[1], classes=self.splits.classes, where=where
            ).eval()
            for network, where in ((config.student, "student"), (config.teacher, TEACHER))
        )
        self.pairs = resolve_pairs(config.pairs, student, teacher, image)
        self.shapes = check_pairs(self.pairs, student, teacher, image, config.fsp.projection)
        sizes = [_bytes_of(student.state_dict()), _bytes_of(teacher.state_dict())]
        students = len(config.seeds) * len(config.arms)
        # A checkpoint holds the weights and up to two numbers of the optimiser for each.
        return students * sizes[0] + 2 * sizes[1] + 3 * (config.checkpoints.keep + 1) * max(sizes)

    def _check_sets(self) -> None:
        """Each training pool fills a batch, each batch its passes and processes; and there are
        validation images where they are needed.
        """
        config = self.config
        own = (config.stage1, config.stage2, config.teacher_training)
        sets: list[tuple[str, Data, Splits, Sequence[Training | None]]] = [
            ("data", config.data, self.splits, own)
        ]
        if config.source is not None and self.source_splits is not None:
            source = config.source
            sets.append(("source.data", source.data, self.source_splits, (source.training,)))
        parts = config.execution.accumulation, self._accelerator.num_processes
        for where, data, splits, trainings in sets:
            check_batch_size(len(splits.train), data.batch_size, *parts, where)
            check_evaluation(splits, trainings, config.evaluation.split, where)


def check_evaluation(
    splits: Splits, trainings: Sequence[Training | None], quoted: str, where: str
) -> None:
    """There are validation images where the quoted figures or a stopping rule need them.

    Of a single one, batch normalisation may have no statistics.

    Args:
        splits: of one data set.
        trainings: what is trained on it.
        quoted: the split of the quoted figures.
        where: the data set's section of the recipe, for messages.

    Raises:
        DistillError: there are none, or only one.
    """
    count = 0 if splits.validation is None else len(splits.validation)
    stops = any(training is not None and training.stop is not None for training in trainings)
    if count < 2 and (stops or quoted == "validation"):
        raise DistillError(
            f"{where}.validation_images: is {count}, must be at least 2: a stopping rule or "
            f"evaluation.split needs the validation split"
        )


def check_folder(folder: Path, resume: bool | None) -> None:
    """``folder`` is ours to write to: absent, empty, or holding an earlier study, all finished."""
    if folder.exists() and not folder.is_dir():
        raise DistillError(f"{folder}: is not a folder; choose another with --output")
    if not is_in_use(folder):
        return
    if not (folder / MARKER).is_file():
        raise DistillError(
            f"{folder}: is not empty and holds no earlier run; choose another with --output"
        )
    unfinished = sorted(path.parent.parent for path in folder.rglob("checkpoints/*.safetensors"))
    if unfinished and resume is None:
        raise DistillError(
            f"{unfinished[0]}: holds an unfinished run; --resume goes on with it, --restart begins "
            f"again"
        )


def _counter(data: Data, images: Split) -> Callable[[Training], int]:
    """Counts the steps of a training on ``images``."""
    per_epoch = len(images) // data.batch_size

    def count(training: Training) -> int:
        if training.steps is not None:
            return training.steps
        assert training.epochs is not None
        return training.epochs * per_epoch

    return count


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _file_of(network: Network) -> str | None:
    """A digest of the weights that a network starts from."""
    return None if network.weights is None else checkpoint.file_digest(Path(network.weights))
