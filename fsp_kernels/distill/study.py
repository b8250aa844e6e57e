"""A recipe in its folder: the teacher, and the students of all arms and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fsp_kernels.distill import checkpoint, records
from fsp_kernels.distill.arms import ARMS, TrainingStage
from fsp_kernels.distill.changes import check_changes, settings_of
from fsp_kernels.distill.config import MOST_STEPS, Config, Data, Pair, Training, dump_config
from fsp_kernels.distill.data import Split, Splits, check_batch_size, load_splits
from fsp_kernels.distill.dry_run import check_logits, check_steps
from fsp_kernels.distill.environment import describe_environment
from fsp_kernels.distill.evaluation import Evaluations
from fsp_kernels.distill.interruption import Interruption
from fsp_kernels.distill.models import build_model, load_weights, parameter_count
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.records import MATRICES, MODEL, RECORD, Phase, Run
from fsp_kernels.distill.runtime import Runtime
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
from fsp_kernels.distill.teacher import CachedTeacher, LiveTeacher, Teacher, load_or_make_cache
from fsp_kernels.distill.train import Job, NetworkTraining
from fsp_kernels.errors import DamagedError, DistillError
from fsp_kernels.features.pairs import check_pairs, find_pairs

MARKER = "config.yaml"
TEACHER, SOURCE = "teacher", "source"


class Study:
    """One recipe in one folder, new or continued.

    The constructor checks all that can be checked before training; nothing changes if a check
    fails. The folder must be absent, empty, or an earlier study's.

    Args:
        config: the recipe.
        folder: for all results.
        monitor: shows progress.
        interruption: is asked after each step whether to stop.
        resume: ``True`` keeps finished networks and continues unfinished ones, ``None`` takes an
            unfinished one as an error, ``False`` begins again, except for source and teacher.
        students: the arms and seeds that will be asked for; the recipe's by default.

    Raises:
        DistillError: the recipe does not fit its data or networks; ``folder`` holds other things,
            cannot be written to or has no space; a network in it is unfinished, or was trained
            under other settings.
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
        self.teacher: LiveTeacher | None = None  # until train_teacher
        self._cached_teacher: CachedTeacher | None = None
        _check_folder(folder, resume)
        self.runtime = Runtime(config, monitor, interruption)
        self._accelerator = self.runtime.accelerator
        self.splits = load_splits(config.data, say=monitor.say)
        self.source_splits: Splits | None = None
        if config.source is not None:
            self.source_splits = load_splits(
                config.source.data, "source.data", self.splits, monitor.say
            )
        self._evaluations = Evaluations(self.splits, self.runtime)
        with self._accelerator.local_main_process_first():  # downloads happen once
            needed = self._check_networks()
        self._weights = {  # digests of the files that the networks start from
            role: file and checkpoint.file_digest(Path(file).expanduser())
            for role, file in (
                ("student", config.student.weights),
                (TEACHER, config.teacher.weights),
            )
        }
        self._check_sets()
        if resume is not False:
            for arm, seed in self._list_needed_networks():
                self._load_finished(self._job(arm, seed))
        self._accelerator.wait_for_everyone()  # all have checked the folder as it was
        if self._accelerator.is_main_process:
            check_writable(folder, needed)
            self._lock = lock(folder)
            remove_unfinished(folder)
            write_text(folder / MARKER, dump_config(config))
        self._accelerator.wait_for_everyone()

    def train_teacher(self) -> LiveTeacher:
        """Train the teacher, its source first if there is one; or load what is finished.

        Raises:
            DistillError, InterruptedRunError: as ``student``.
        """
        if self.teacher is None:
            config, seed = self.config, self.config.teacher_seed
            network = self.runtime.new_network(config.teacher, self.splits, seed, TEACHER)
            if self.source_splits is not None:
                splits = self.source_splits
                source = self.runtime.new_network(config.teacher, splits, seed, TEACHER)
                evaluations = Evaluations(splits, self.runtime)
                self._load_or_train(self._job(SOURCE, seed), source, evaluations)
                load_weights(network, source.state_dict(), SOURCE)
            self._load_or_train(self._job(TEACHER, seed), network, self._evaluations)
            compiled = config.execution.compile
            self.teacher = LiveTeacher(network, self.pairs, self._accelerator, compiled)
            self._evaluations = Evaluations(self.splits, self.runtime, self.teacher)
        return self.teacher

    def student(self, arm: str, seed: int) -> Run:
        """Train one student, or load it if it is finished and the study was not restarted.

        All arms of one seed share the initial weights and, as far as they go, the order of images
        on the task loss.

        Args:
            arm: a key of ``ARMS``; the teacher is trained first if the arm needs it.
            seed: of the initial weights, the order of images and their augmentation.

        Raises:
            DistillError: a loss is no longer finite; a file cannot be written; the folder holds
                this student under other settings.
            InterruptedRunError: a signal stopped it; a checkpoint was written.
        """
        teacher: Teacher | None = None
        if any(stage.needs_teacher for stage in self.stages(arm)):
            teacher = live = self.train_teacher()
            if self.config.fsp.cache_teacher:
                folder, images = self.folder / TEACHER / "cache", self.splits.train
                if self._cached_teacher is None:
                    self._cached_teacher = load_or_make_cache(
                        live, images, self.config, self._accelerator, folder
                    )
                teacher = self._cached_teacher
        network = self.runtime.new_network(self.config.student, self.splits, seed, "student")
        return self._load_or_train(self._job(arm, seed), network, self._evaluations, teacher)

    def all(self) -> list[Run]:
        """Train the teacher, then all students that were announced."""
        self.train_teacher()
        return [self.student(arm, seed) for arm, seed in self.students]

    @property
    def summary(self) -> str:
        """If nothing was trained: that all was finished, and what ``--restart`` would cost."""
        if self.trained:
            return ""
        students = [run for run in self.reused if run.arm in ARMS]
        seconds = sum(run.seconds for run in students)
        cost = f"; --restart trains it again, which took {seconds:.1f} s of steps"
        finished = f"{self.folder}: was finished, so nothing was trained"
        return finished + (cost if students else "")

    def folder_of(self, arm: str, seed: int) -> Path:
        """The folder of a student, of the teacher or of the source."""
        return self.folder / arm / f"seed-{seed}" if arm in ARMS else self.folder / arm

    def _list_needed_networks(self) -> list[tuple[str, int]]:
        """Arms and seeds of all networks that the students need, themselves included."""
        needed, seed = list(self.students), self.config.teacher_seed
        if not needed or any(s.needs_teacher for arm, _ in needed for s in self.stages(arm)):
            needed += [(TEACHER, seed)] + [(SOURCE, seed)] * (self.config.source is not None)
        return needed

    def stages(self, arm: str) -> tuple[TrainingStage, ...]:
        """The stages of a student, of the teacher or of the source, with their steps."""
        data, _, images = self._data_of(arm)

        def count(training: Training) -> int:
            return _steps(training, data, images)

        if arm in ARMS:
            return ARMS[arm].stages(self.config, count)
        section, training = "teacher_training", self.config.teacher_training
        if arm == SOURCE and self.config.source is not None:
            section, training = "source.training", self.config.source.training
        return (
            () if training is None else (TrainingStage("task", section, training, count(training)),)
        )

    def _data_of(self, arm: str) -> tuple[Data, Splits, Split]:
        """How a network's data are read, all of them, and the images that it is trained on."""
        if arm in ARMS:
            return self.config.data, self.splits, self.splits.train
        if arm == SOURCE and self.config.source is not None and self.source_splits is not None:
            return self.config.source.data, self.source_splits, self.source_splits.teacher_train
        return self.config.data, self.splits, self.splits.teacher_train

    def _job(self, arm: str, seed: int) -> Job:
        """The job of a student, of the teacher or of the source."""
        stages, (data, splits, images) = self.stages(arm), self._data_of(arm)
        distilled = any(stage.needs_teacher for stage in stages)
        role = "student" if arm in ARMS else TEACHER
        tree = to_tree(self.config)
        settings: dict[str, Any] = {
            "arm": arm,
            "seed": seed,
            role: tree[role],
            "execution": tree["execution"],
            "evaluation": tree["evaluation"],
            "weights": self._weights[role],
            "images": [images.fingerprint, splits.test.fingerprint],
        }
        if arm == SOURCE:
            settings["source"] = {"data": tree["source"]["data"]}
        else:  # the number of the other role's images does not matter
            del tree["data"]["teacher_images" if arm in ARMS else "train_images"]
            settings["data"] = tree["data"]
        if arm == TEACHER:
            settings["source"] = tree["source"]
        if distilled:
            settings |= {"pairs": [to_tree(pair) for pair in self.pairs], "fsp": tree["fsp"]}
            if self.teacher is not None:
                settings["teacher"] = checkpoint.digest_of(self.teacher.network.state_dict())
        return Job(
            arm=arm,
            label=f"{arm} seed {seed}" if arm in ARMS else arm,
            seed=seed,
            stages=stages,
            data=data,
            images=images,
            folder=self.folder_of(arm, seed),
            settings=settings | settings_of(stages),
            pairs=self.pairs if distilled else (),
            shapes=self.shapes if distilled else (),
        )

    def _load_or_train(
        self, job: Job, network: nn.Module, evaluations: Evaluations, teacher: Teacher | None = None
    ) -> Run:
        """Load the finished run of ``job`` into ``network``, or train it."""
        reusable = self._resume is not False or job.arm not in ARMS
        run = self._load_finished(job, network) if reusable else None
        # Also a barrier: all have read what there is, so it may be deleted.
        require_agreement(run is not None, job.folder)
        if run is not None:
            if self._accelerator.is_main_process:  # an earlier one may have been killed before this
                job.checkpoints.clear()
            self.reused.append(run)
            self._say_result(job, run, f"finished earlier, in {run.seconds:.1f} s")
            return run
        if self._accelerator.is_main_process:
            self._delete_results(job)
        self._accelerator.wait_for_everyone()
        if job.stages:
            training = NetworkTraining(self.runtime, job, network, evaluations, teacher)
            phases = training.run(bool(self._resume))
        else:
            figures = evaluations.task(network.eval())
            evaluations.close()
            phases = [Phase("as given", [], [{"step": 0, **figures}], 0.0, False)]
        run = Run(
            arm=job.arm,
            seed=job.seed,
            network=(self.config.student if job.arm in ARMS else self.config.teacher).model,
            parameters=parameter_count(network),
            phases=phases,
            settings=job.settings,
            config=to_tree(self.config),
            environment=describe_environment(self._accelerator.device),
        )
        if self._accelerator.is_main_process:
            checkpoint.save(job.folder / MODEL, network.state_dict(), {"settings": job.settings})
            records.write(run, job.folder)
            job.checkpoints.clear()
        self._accelerator.wait_for_everyone()
        self.trained.append(run)
        self._say_result(job, run, f"{run.seconds:.1f} s")
        return run

    def _load_finished(self, job: Job, network: nn.Module | None = None) -> Run | None:
        """The finished run of ``job``, or ``None``; its weights are loaded into ``network``.

        Without a network it is only checked whether the run has the settings of the job.
        """
        if not records.is_finished(job.folder):
            return None
        try:
            run = records.read(job.folder)
            # Before the teacher is trained, its digest is unknown.
            now = {"teacher": run.settings.get("teacher")} | job.settings
            check_changes(job.folder, run.settings, now, job.stages)
            if network is not None:
                path = job.folder / MODEL
                checkpoint.restore(network, checkpoint.load(path), path)
            return run
        except DamagedError as error:
            why = str(error)
        except DistillError:
            if self._resume is not False:
                raise
            why = f"{job.folder}: of other settings, or of another version of this program"
        if network is not None:
            self.monitor.say(f"{why}; training it anew")
        return None

    def _delete_results(self, job: Job) -> None:
        """Delete what an earlier run left and this one could be taken for."""
        job.folder.mkdir(parents=True, exist_ok=True)
        for name in (RECORD, MODEL):
            (job.folder / name).unlink(missing_ok=True)
        if not self._resume:  # a run that goes on in stage 2 needs the matrices of stage 1
            (job.folder / MATRICES).unlink(missing_ok=True)
            job.checkpoints.clear()

    def _say_result(self, job: Job, run: Run, how: str) -> None:
        split = self.config.evaluation.split
        self.monitor.say(f"{job.label}: {split} accuracy {run.accuracy:.2%}, {how}")

    def _check_networks(self) -> int:
        """Try the networks, and set ``pairs`` and ``shapes``.

        Returns:
            The bytes that the study may need on its disk.
        """
        config, classes = self.config, self.splits.classes
        image = self.splits.test[0].image[None]
        images = image.repeat(2, 1, 1, 1)  # batch normalisation needs two
        student, teacher = (
            build_model(network, in_channels=image.shape[1], classes=classes, where=where).eval()
            for network, where in ((config.student, "student"), (config.teacher, TEACHER))
        )
        trained = config.teacher_training is not None
        check_logits(student, images, classes, "student")
        check_logits(teacher, images, classes, TEACHER, trained=trained)
        self.pairs = (
            config.pairs
            if isinstance(config.pairs, tuple)
            else tuple(
                Pair(student=pair.student, teacher=pair.teacher)
                for pair in find_pairs(config.pairs, student, teacher, image)
            )
        )
        self.shapes = check_pairs(self.pairs, student, teacher, image, config.fsp.projection)
        check_steps(teacher, self.stages(TEACHER), images, TEACHER, config.fsp)
        # Stages with equal losses differ in nothing that is checked.
        stages = {(s.task, s.fsp, s.kd): s for arm, _ in self.students for s in self.stages(arm)}
        both = self.pairs, self.shapes
        check_steps(student, [*stages.values()], images, "student", config.fsp, *both, teacher)
        networks = student, teacher
        sizes = [sum(x.nbytes for x in network.state_dict().values()) for network in networks]
        # A checkpoint has the weights and up to two numbers of the optimiser for each; two are
        # kept while a third is written.
        return len(self.students) * sizes[0] + 2 * sizes[1] + 3 * 3 * max(sizes)

    def _check_sets(self) -> None:
        """Check batch sizes, validation images and numbers of steps against the data."""
        config, own = self.config, self.splits
        trainings = {
            "stage1": (config.stage1, own.train),
            "stage2": (config.stage2, own.train),
            "teacher_training": (config.teacher_training, own.teacher_train),
        }
        self._check_set("data", config.data, own, trainings)
        if config.source is not None and self.source_splits is not None:
            data, splits = config.source.data, self.source_splits
            trainings = {"source.training": (config.source.training, splits.teacher_train)}
            self._check_set("source.data", data, splits, trainings)

    def _check_set(
        self,
        where: str,
        data: Data,
        splits: Splits,
        trainings: Mapping[str, tuple[Training | None, Split]],
    ) -> None:
        """Check one data set; ``trainings`` on it are named by their sections of the recipe."""
        parts = self.config.execution.accumulation, self._accelerator.num_processes
        check_batch_size(len(splits.train), data.batch_size, *parts, where)
        # Batch normalisation may have no statistics of a single image.
        count = 0 if splits.validation is None else len(splits.validation)
        stops = any(training is not None and training.stop for training, _ in trainings.values())
        if count < 2 and (stops or self.config.evaluation.split == "validation"):
            raise DistillError(
                f"{where}.validation_images: is {count}, must be at least 2: a stopping rule or "
                f"evaluation.split needs the validation split"
            )
        for name, (training, images) in trainings.items():
            steps = 0 if training is None else _steps(training, data, images)
            if training is not None and steps > MOST_STEPS:
                raise DistillError(
                    f"{name}.epochs: is {training.epochs}, which are {steps} steps, must be at "
                    f"most {MOST_STEPS} steps"
                )


def _check_folder(folder: Path, resume: bool | None) -> None:
    """Check that ``folder`` is absent, empty or an earlier study's, without unfinished runs.

    Raises:
        DistillError: it is not so; unfinished runs are allowed unless ``resume`` is ``None``.
    """
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


def _steps(training: Training, data: Data, images: Split) -> int:
    """The steps of ``training`` on ``images``."""
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return training.epochs * (len(images) // data.batch_size)
