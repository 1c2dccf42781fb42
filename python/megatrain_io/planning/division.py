"""How RAM and VRAM are divided for a job, and whether they are enough."""

from megatrain_io.errors import DoesNotFitError
from megatrain_io.paging.device.pool import VramPlan
from megatrain_io.planning.job import TrainingJob
from megatrain_io.planning.memory_needs import least_vram_for, plan_ram, plan_vram
from megatrain_io.planning.ram_budget import RamPlan, StepNeeds, least_ram

__all__ = ["divide_ram_of", "divide_vram_of", "fits_memory", "has_ram", "vram_nbytes"]


def vram_nbytes(job: TrainingJob) -> int:
    """The least bytes of VRAM that a step of the job can be done in."""
    return least_vram_for(job.partition, job.layout, job.needs)


def divide_vram_of(job: TrainingJob) -> tuple[VramPlan | None, StepNeeds]:
    """How VRAM is divided, if a device computes; and what RAM must hold then.

    Where the device has too little, it is divided as if that were just enough: then the rest can still be planned.
    """
    if job.vram is None:
        return None, job.needs
    vram = max(job.vram, vram_nbytes(job))
    return plan_vram(job.partition, job.layout, job.needs, vram=vram)


def divide_ram_of(job: TrainingJob, needs: StepNeeds) -> RamPlan:
    """How RAM is divided for steps that need ``needs`` of it.

    Raises:
        DoesNotFitError: it is too small; the message has the least that is enough.
    """
    return plan_ram(job.partition, job.layout, needs, ram=job.ram, defers=job.defers)


def has_ram(job: TrainingJob, needs: StepNeeds, ram: int) -> bool:
    """Whether ``ram`` bytes are enough for steps that need ``needs`` of it."""
    tied = bool(job.partition.tied_parameters)
    return ram >= least_ram(job.layout, needs, tied_embeddings=tied, defers=job.defers)


def fits_memory(job: TrainingJob) -> bool:
    """Whether RAM and VRAM are enough for a step of the job."""
    needs = job.needs
    if job.vram is not None:
        try:
            needs = plan_vram(job.partition, job.layout, needs, vram=job.vram)[1]
        except DoesNotFitError:
            return False
    return has_ram(job, needs, job.ram)
