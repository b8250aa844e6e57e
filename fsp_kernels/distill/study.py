"""A recipe in its folder: the teacher, and students trained in as many ways as are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fsp_kernels.distill import checkpoint, records
from fsp_kernels.distill.arms import ARMS, Stage
from fsp_kernels.distill.changes import check_changes, settings_of
from fsp_kernels.distill.checkpoint import Series
from fsp_kernels.distill.config import MOST_STEPS, Config, Data, Training, dump_config
from fsp_kernels.distill.data import Split, Splits, check_batch_size, load_splits
from fsp_kernels.distill.dry_run import check_logits, check_steps
from fsp_kernels.distill.environment import describe_environment
from fsp_kernels.distill.errors import DamagedError, DistillError
from fsp_kernels.distill.evaluation import Evaluations
from fsp_kernels.distill.interruption import Interruption
from fsp_kernels.distill.job import Job
from fsp_kernels.distill.models import build_model, load_weights, parameter_count
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.pairs import check_pairs, resolve_pairs
from fsp_kernels.distill.records import MODEL, Phase, Run
from fsp_kernels.distill.settings import to_tree
from fsp_kernels.distill.storage import (
    check_is_folder,
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
        resume: finished networks are kept and unfinished ones gone on with (``True``) or an error
            (``None``). ``False`` begins again, but for a teacher trained under the same settings.
        students: the arms and seeds that are going to be asked for; the recipe's by default.

    Raises:
        DistillError: the recipe does not fit its data or networks; ``folder`` holds other things,
            can't be written to or has no space; something in it is unfinished, or was trained under
            other settings.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        monitor: Monitor,
        interruption: Interruption,
        resume: bool | None = None,
        students: Sequence[tuple[str, int]] | None = None,
    ) -> None:
        self.config, self.folder, self.monitor, self._resume = config, folder, monitor, resume
        if students is None:
            students = [(arm, seed) for seed in config.seeds for arm in config.arms]
        self.students = students
        self.trained: list[Run] = []
        self.reused: list[Run] = []
        check_folder(folder, resume)
        self.trainer = Trainer(config, monitor, interruption)
        self._accelerator = self.trainer.accelerator
        self.splits = load_splits(config.data, say=monitor.say)
        self.source_splits = self._load_source()
        with self._accelerator.local_main_process_first():  # what is downloaded, is so once
            needed = self._check_networks()
        self._check_sets()
        if resume is not False:
            self._check_finished()
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
        config, job = self.config, self._teacher_job()
        network = self.trainer.new_network(config.teacher, self.splits, job.seed, TEACHER)
        if self.source_splits is not None:
            load_weights(network, self._source().state_dict(), SOURCE)
        self._done(job, network, self._plain)
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
        job = self._student_job(arm, seed)
        distilled = any(stage.needs_teacher for stage in job.stages)
        if distilled:
            job.settings["teacher"] = checkpoint.digest_of(self.teacher.network.state_dict())
        network = self.trainer.new_network(self.config.student, self.splits, seed, "student")
        # The teacher may take all the steps it takes to train before there is a student.
        evaluations = self._distilled if distilled else self._plain
        return self._done(job, network, evaluations, self._answers if distilled else None)

    def _student_job(self, arm: str, seed: int) -> Job:
        config, stages = self.config, self.stages(arm)
        distilled = any(stage.needs_teacher for stage in stages)
        settings = self._settings("data", "student", "execution", "evaluation")
        del settings["data"]["teacher_images"]  # the images and the teacher say what they are
        settings |= settings_of(stages) | {
            "arm": arm,
            "seed": seed,
            "weights": self._weights["student"],
            "images": [self.splits.train.fingerprint, self.splits.test.fingerprint],
        }
        if distilled:
            settings["pairs"] = [to_tree(pair) for pair in self.pairs]
            settings["fsp"] = to_tree(config.fsp)
        return Job(
            arm=arm,
            label=f"{arm} seed {seed}",
            network=config.student,
            seed=seed,
            stages=stages,
            data=config.data,
            images=self.splits.train,
            folder=self.folder_of(arm, seed),
            settings=settings,
            pairs=self.pairs if distilled else (),
            shapes=self.shapes if distilled else (),
        )

    @property
    def summary(self) -> str:
        """Where nothing was trained, that it was finished, and what ``--restart`` would cost."""
        if self.trained:
            return ""
        students = [run for run in self.reused if run.arm not in (TEACHER, SOURCE)]
        seconds = sum(run.seconds for run in students)
        cost = f"; --restart trains it again, which took {seconds:.1f} s of steps"
        finished = f"{self.folder}: was finished, so nothing was trained"
        return finished + (cost if students else "")

    def folder_of(self, arm: str, seed: int) -> Path:
        """Where a student is kept."""
        return self.folder / arm / f"seed-{seed}"

    def all(self) -> list[Run]:
        """The students that were to be asked for; the teacher first."""
        _ = self.teacher
        return [self.student(arm, seed) for arm, seed in self.students]

    def stages(self, arm: str) -> tuple[Stage, ...]:
        """The stages of ``arm`` and the steps they take."""
        return ARMS[arm].stages(self.config, _counter(self.config.data, self.splits.train))

    @cached_property
    def _weights(self) -> dict[str, str | None]:
        """Digests of the files that the networks start from."""
        networks = {"student": self.config.student, TEACHER: self.config.teacher}
        return {
            role: network.weights and checkpoint.file_digest(Path(network.weights).expanduser())
            for role, network in networks.items()
        }

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

    def _source(self) -> nn.Module:
        """The teacher as its source data leave it."""
        assert self.source_splits is not None
        seed, job = self.config.teacher_seed, self._source_job()
        network = self.trainer.new_network(job.network, self.source_splits, seed, TEACHER)
        self._done(job, network, Evaluations(self.source_splits, self.trainer.setup))
        return network

    def _settings(self, *names: str) -> dict[str, Any]:
        """These sections of the recipe."""
        tree = to_tree(self.config)
        return {name: tree[name] for name in names}

    def _teacher_job(self) -> Job:
        config, training = self.config, self.config.teacher_training
        settings = self._settings("data", "teacher", "source", "execution", "evaluation")
        del settings["data"]["train_images"]
        return self._job(TEACHER, "teacher_training", training, config.data, self.splits, settings)

    def _source_job(self) -> Job:
        source = self.config.source
        assert source is not None
        assert self.source_splits is not None
        settings = self._settings("teacher", "execution", "evaluation")
        settings["source"] = {"data": to_tree(source.data)}
        section, splits = "source.training", self.source_splits
        return self._job(SOURCE, section, source.training, source.data, splits, settings)

    def _job(
        self,
        arm: str,
        section: str,
        training: Training | None,
        data: Data,
        splits: Splits,
        settings: dict[str, Any],
    ) -> Job:
        """To train the teacher on ``data``, if there is a ``training``."""
        images, seed = splits.teacher_train, self.config.teacher_seed
        stages: tuple[Stage, ...] = ()
        if training is not None:
            stages = (Stage("task", section, training, _counter(data, images)(training)),)
        settings |= settings_of(stages) | {
            "arm": arm,
            "seed": seed,
            "weights": self._weights[TEACHER],
            "images": [images.fingerprint, splits.test.fingerprint],
        }
        return Job(
            arm=arm,
            label=arm,
            network=self.config.teacher,
            seed=seed,
            stages=stages,
            data=data,
            images=images,
            folder=self.folder / arm,
            settings=settings,
        )

    def _done(
        self, job: Job, network: nn.Module, evaluations: Evaluations, teacher: Teacher | None = None
    ) -> Run:
        """Make of ``network`` what ``job`` asks for: read what is finished, or else train."""
        reused = self._resume is not False or job.arm in (TEACHER, SOURCE)
        run = self._earlier(job, network) if reused else None
        # By now all have read what there is, so it may go.
        require_agreement(run is not None, job.folder)
        if run is not None:
            if self._accelerator.is_main_process:  # which may have been killed before it did this
                Series(job.folder / "checkpoints").clear()
            self.reused.append(run)
            self._say(job, run, f"finished earlier, in {run.seconds:.1f} s")
            return run
        if self._accelerator.is_main_process:
            self._clear(job)
        self._accelerator.wait_for_everyone()
        if job.stages:
            phases = self.trainer.train(job, network, evaluations, teacher, bool(self._resume))
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
            settings=job.settings,
            config=to_tree(self.config),
            environment=describe_environment(self._accelerator.device),
        )
        if self._accelerator.is_main_process:
            checkpoint.save(job.folder / MODEL, network.state_dict(), {"settings": job.settings})
            records.write(run, job.folder)
            Series(job.folder / "checkpoints").clear()
        self._accelerator.wait_for_everyone()
        self.trained.append(run)
        self._say(job, run, f"{run.seconds:.1f} s")
        return run

    def _earlier(self, job: Job, network: nn.Module) -> Run | None:
        """What an earlier process made of the same job, loaded into ``network``."""
        path = job.folder / MODEL
        try:
            run = self._finished(job)
            if run is not None:
                checkpoint.restore(network, checkpoint.load(path), path)
            return run
        except DamagedError as error:
            self.monitor.say(f"{error}; training it anew")
            return None

    def _finished(self, job: Job) -> Run | None:
        """The record of the same job, if it is finished."""
        if not records.is_finished(job.folder):
            return None
        try:
            run = records.read(job.folder)
            # A student's teacher may have to be trained before it is known.
            now = {"teacher": run.settings.get("teacher")} | job.settings
            check_changes(job.folder, run.settings, now, job.stages)
        except DistillError as error:
            if self._resume is not False or isinstance(error, DamagedError):
                raise
            self.monitor.say(
                f"{job.folder}: of other settings, or of another version of this program; training "
                f"the {job.arm} anew"
            )
            return None
        return run

    def _check_finished(self) -> None:
        """What is finished, of all that is going to be asked for, was so under these settings."""
        jobs = [self._student_job(arm, seed) for arm, seed in self.students]
        if not jobs or any(stage.needs_teacher for job in jobs for stage in job.stages):
            jobs.append(self._teacher_job())
            if self.config.source is not None:
                jobs.append(self._source_job())
        for job in jobs:
            with suppress(DamagedError):  # which will be told of, and trained anew
                self._finished(job)

    def _clear(self, job: Job) -> None:
        """Of an earlier run nothing may stay that this one could be taken for."""
        job.folder.mkdir(parents=True, exist_ok=True)
        for name in (records.RECORD, MODEL):
            (job.folder / name).unlink(missing_ok=True)
        if not self._resume:  # an unfinished run may be in its second stage, these are of the first
            (job.folder / records.MATRICES).unlink(missing_ok=True)
            Series(job.folder / "checkpoints").clear()

    def _say(self, job: Job, run: Run, how: str) -> None:
        split = self.config.evaluation.split
        self.monitor.say(f"{job.label}: {split} accuracy {run.accuracy:.2%}, {how}")

    def _check_networks(self) -> int:
        """Tries the networks and sets ``pairs`` and ``shapes``.

        Returns:
            The bytes that the study may come to take on its disk.
        """
        config, classes = self.config, self.splits.classes
        image = self.splits.test[0].image[None]
        images = image.repeat(2, 1, 1, 1)  # batch normalisation needs two
        student, teacher = (
            build_model(network, in_channels=image.shape[1], classes=classes, where=where).eval()
            for network, where in ((config.student, "student"), (config.teacher, TEACHER))
        )
        training = config.teacher_training
        check_logits(student, images, classes, "student")
        check_logits(teacher, images, classes, TEACHER, trained=training is not None)
        self.pairs = resolve_pairs(config.pairs, student, teacher, image)
        self.shapes = check_pairs(self.pairs, student, teacher, image, config.fsp.projection)
        if training is not None:
            stage = Stage("task", "teacher_training", training, 1)
            check_steps(teacher, [stage], images, TEACHER, config.fsp)
        # Other steps make no other loss.
        stages = {(s.task, s.fsp, s.kd): s for arm, _ in self.students for s in self.stages(arm)}
        both = self.pairs, self.shapes
        check_steps(student, [*stages.values()], images, "student", config.fsp, *both, teacher)
        sizes = [_bytes_of(student.state_dict()), _bytes_of(teacher.state_dict())]
        # A checkpoint holds the weights and up to two numbers of the optimiser for each. There are
        # two, and a third while it is written.
        return len(self.students) * sizes[0] + 2 * sizes[1] + 3 * 3 * max(sizes)

    def _check_sets(self) -> None:
        """Each training pool fills a batch, each batch its passes and processes; and there are
        validation images where they are needed.
        """
        config = self.config
        own = {name: getattr(config, name) for name in ("stage1", "stage2", "teacher_training")}
        sets = [("data", config.data, self.splits, own)]
        if config.source is not None and self.source_splits is not None:
            source = config.source
            trainings = {"source.training": source.training}
            sets.append(("source.data", source.data, self.source_splits, trainings))
        parts = config.execution.accumulation, self._accelerator.num_processes
        for where, data, splits, trainings in sets:
            check_batch_size(len(splits.train), data.batch_size, *parts, where)
            check_evaluation(splits, list(trainings.values()), config.evaluation.split, where)
            for name, training in trainings.items():
                students = name in ("stage1", "stage2")
                images = splits.train if students else splits.teacher_train
                steps = 0 if training is None else _counter(data, images)(training)
                if steps > MOST_STEPS:
                    raise DistillError(
                        f"{name}.epochs: is {training.epochs}, which are {steps} steps, must be at "
                        f"most {MOST_STEPS} steps"
                    )


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
    check_is_folder(folder)
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
