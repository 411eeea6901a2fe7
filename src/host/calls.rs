//! System calls that are not there, are forbidden, or are to be made again.

use std::io;

use nix::errno::Errno;

/// How often a call is made again that asks for that. The kernel does so when something else was
/// quicker, and that passes; a seccomp filter may do so each time, or signals may come without
/// end.
const TRIES: usize = 1000;

/// Whether the kernel does not have a call, or a seccomp filter forbids it: whatever it was for,
/// it is not because of its arguments, and another way may be open.
pub(crate) fn is_refused(errno: Errno) -> bool {
    matches!(errno, Errno::ENOSYS | Errno::EPERM | Errno::EACCES)
}

/// As [`is_refused`], of an error.
pub(crate) fn was_refused(error: &io::Error) -> bool {
    error
        .raw_os_error()
        .map(Errno::from_raw)
        .is_some_and(is_refused)
}

/// Makes a call until it answers something other than `EAGAIN` and `EINTR`, within reason.
pub(crate) fn retried<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    for _ in 1..TRIES {
        match call() {
            Err(Errno::EAGAIN | Errno::EINTR) => std::thread::yield_now(),
            answer => return answer,
        }
    }
    call()
}

/// Does something in a thread for which a filter answers each of these calls.
#[cfg(test)]
pub(crate) fn forbidden<R: Send>(
    calls: &[nix::libc::c_long],
    errno: Errno,
    work: impl FnOnce() -> R + Send,
) -> R {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    let answer = SeccompAction::Errno(errno as u32);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, arch).unwrap();
    let program = BpfProgram::try_from(filter).unwrap();
    let filtered = || {
        apply_filter(&program).unwrap();
        work()
    };
    std::thread::scope(|scope| scope.spawn(filtered).join().unwrap())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_made_again_but_not_without_end() {
        let mut made = 0;
        let mut answers = |errno, times| {
            made = 0;
            let answer = retried(|| {
                made += 1;
                if made > times { Ok(made) } else { Err(errno) }
            });
            (answer, made)
        };
        assert_eq!(answers(Errno::EAGAIN, 5), (Ok(6), 6));
        assert_eq!(answers(Errno::EINTR, TRIES), (Err(Errno::EINTR), TRIES));
        assert_eq!(
            answers(Errno::EAGAIN, usize::MAX),
            (Err(Errno::EAGAIN), TRIES)
        );
        assert_eq!(answers(Errno::EFAULT, 5), (Err(Errno::EFAULT), 1));
    }
}
