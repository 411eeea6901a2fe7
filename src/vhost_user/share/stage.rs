//! What a daemon is told one after the other.

/// Messages that are under way together: the next stage begins when all of them are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// How many regions the daemon takes, unless that is known.
    Slots,
    /// It has a log that is long enough for the table.
    LogBefore,
    Table,
    /// It logs in all regions of the table.
    LogAfter,
    /// It has taken the log.
    LogTaken,
    /// Messages of a session's own.
    Ask,
}

/// All of an update.
pub(super) const UPDATE: &[Stage] = &[
    Stage::Slots,
    Stage::LogBefore,
    Stage::Table,
    Stage::LogAfter,
];
