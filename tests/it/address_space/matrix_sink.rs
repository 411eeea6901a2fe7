//! A connection to a daemon that does something at one message.

use guest_memory_shm::{DaemonConnection, DaemonFailure, DaemonLog, Disconnector, TableRegion};
use vhost::vhost_user::Frontend;

/// When something is done, around the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    Before,
    After,
}

/// What is done at one message.
pub(super) struct Hook {
    /// Counted from 1 since the hook was set; 0: the question for the number of slots.
    pub(super) message: usize,
    pub(super) moment: Moment,
    pub(super) act: Box<dyn FnOnce() + Send>,
}

/// A frontend with hooks. Without a frontend it only keeps a place.
#[derive(Default)]
pub(super) struct Sink {
    frontend: Option<Frontend>,
    messages: usize,
    hooks: Vec<Hook>,
}

impl Sink {
    pub(super) fn new(frontend: Frontend) -> Self {
        Self {
            frontend: Some(frontend),
            ..Self::default()
        }
    }

    /// Counts messages from now on.
    pub(super) fn arm(&mut self, hooks: Vec<Hook>) {
        self.messages = 0;
        self.hooks = hooks;
    }

    /// How many hooks have not fired.
    pub(super) fn pending(&self) -> usize {
        self.hooks.len()
    }

    fn frontend(&mut self) -> &mut Frontend {
        self.frontend.as_mut().expect("it is connected")
    }

    fn change<T>(&mut self, send: impl FnOnce(&mut Frontend) -> T) -> T {
        self.messages += 1;
        self.around(self.messages, send)
    }

    fn around<T>(&mut self, message: usize, send: impl FnOnce(&mut Frontend) -> T) -> T {
        self.fire(message, Moment::Before);
        let answer = send(self.frontend());
        self.fire(message, Moment::After);
        answer
    }

    fn fire(&mut self, message: usize, moment: Moment) {
        let fires = |hook: &mut Hook| (hook.message, hook.moment) == (message, moment);
        for hook in self.hooks.extract_if(.., fires) {
            (hook.act)();
        }
    }
}

impl DaemonConnection for Sink {
    fn request_acks(&mut self) {
        self.frontend().request_acks();
    }
    fn set_mem_table(
        &mut self,
        regions: &[TableRegion],
    ) -> Result<Option<Vec<u64>>, DaemonFailure> {
        self.change(|frontend| DaemonConnection::set_mem_table(frontend, regions))
    }
    fn add_mem_region(&mut self, region: &TableRegion) -> Result<Option<u64>, DaemonFailure> {
        self.change(|frontend| DaemonConnection::add_mem_region(frontend, region))
    }
    fn remove_mem_region(&mut self, region: &TableRegion) -> Result<(), DaemonFailure> {
        self.change(|frontend| DaemonConnection::remove_mem_region(frontend, region))
    }
    fn max_mem_slots(&mut self) -> Result<u64, DaemonFailure> {
        self.around(0, |frontend| frontend.max_mem_slots())
    }
    fn set_log_base(&mut self, log: &DaemonLog) -> Result<Option<u32>, DaemonFailure> {
        DaemonConnection::set_log_base(self.frontend(), log)
    }
    fn barrier(&mut self) -> Result<(), DaemonFailure> {
        self.frontend().barrier()
    }
    fn disconnector(&self) -> Option<Disconnector> {
        self.frontend
            .as_ref()
            .and_then(DaemonConnection::disconnector)
    }
}
