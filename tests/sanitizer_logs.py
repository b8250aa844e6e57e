"""Logs of compute-sanitizer's racecheck, and the machine code that they name."""

# As cuobjdump prints fsp_residual of an sm_90a cubin, shortened.
SASS = """
\tcode for sm_90a
\t\tFunction : fsp_residual
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0040*/               @P0 EXIT ;                              /* 0x000000000000094d */
        /*0100*/              @!P1 LDGSTS.E.BYPASS.128 [R3], [R4.64] ; /* 0x0000000004037fae */
        /*0110*/              @!PT LDS RZ, [RZ] ;                      /* 0x00000000ffffff84 */
        /*0120*/                   STS.128 [R3], R8 ;                  /* 0x0000000803007388 */
        /*25f0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*2600*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*2700*/               @P2 UBLKCP.T.S.G [UR4], [UR6], UR8 ;    /* 0x00000004060073ba */
"""
LDGSTS, LDS, STS, WGMMA, WGMMA_TOO, BULK = 0x100, 0x110, 0x120, 0x25F0, 0x2600, 0x2700


def report(*accesses: tuple[str, int], level: str = "Error", kernel: str = "fsp_residual") -> str:
    """One report of racecheck, as its default mode prints it."""
    (kind, offset), *others = accesses
    lines = [
        f"========= {level}: Race reported between {kind} access at {kernel}+{offset:#x} in a.py:8"
    ]
    lines += [
        f"=========     and {kind} access at {kernel}+{offset:#x} in tiles.py:80 [64 hazards]"
        for kind, offset in others
    ]
    return "\n".join([*lines, "========= ", ""])


def log(*reports: str) -> str:
    many = f"{len(reports)} hazard{'s' if len(reports) != 1 else ''}"
    summary = f"========= RACECHECK SUMMARY: {many} displayed ({len(reports)} errors, 0 warnings)\n"
    return "========= COMPUTE-SANITIZER\n" + "".join(reports) + summary
