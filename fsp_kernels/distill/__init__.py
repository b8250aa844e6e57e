"""The reference trainer: FSP distillation end to end (extra ``train``, script ``fsp-distill``)."""
