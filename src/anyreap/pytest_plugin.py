"""The pytest plugin: fixtures `reaper` and `no_leaked_children`, option `--fail-on-leaked-children`.

pytest loads it by itself where anyreap is installed, as `anyreap` (`-p no:anyreap` leaves it out), and from
`_anyreap_pytest`, where it is: importing a module of this package would import all of it.
"""

from __future__ import annotations

from _anyreap_pytest import (
    no_leaked_children as no_leaked_children,
    pytest_addoption as pytest_addoption,
    pytest_configure as pytest_configure,
    pytest_fixture_setup as pytest_fixture_setup,
    pytest_runtest_setup as pytest_runtest_setup,
    pytest_runtest_teardown as pytest_runtest_teardown,
    reaper as reaper,
)

__all__ = ("no_leaked_children", "reaper")
