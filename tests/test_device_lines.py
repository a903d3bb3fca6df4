"""The page of devices tells of every line that depends on one; no vendor is named in silence."""

from device_lines import BEGIN, END, NAMED, NOT_RUN, PAGE, RAN, lines, table, vendor_lines


def test_every_line_that_names_one_vendor_has_its_reason():
    assert vendor_lines() == set(NAMED), "give it a reason in tests/device_lines.py, or no vendor"


def test_the_table_has_every_line_that_depends_on_the_device():
    assert {module for module, _ in lines()} <= set(RAN)
    assert set(lines()) >= NOT_RUN
    written = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert written == table(), "python tests/device_lines.py writes it"
