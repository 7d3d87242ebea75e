"""What shuts a submission in, run as a program of its own: ``python -I -S advbn_lib/grading/confinement CONFIG``.

Standard library and system calls only, because it runs before anything else is loaded. See
:mod:`advbn_lib.grading.sandbox` for what it promises.
"""
