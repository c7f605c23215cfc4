"""Looking into a report of results by group."""


def row_of(report, metric=None, **group):
    (row,) = (row for row in report.rows if row.group == group and metric in (None, row.metric))
    return row
