//! A relay between a frontend and a daemon, which sees each message.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;

pub(super) const SET_LOG_BASE: u32 = 6;
pub(super) const ADD_MEM_REG: u32 = 37;

/// Messages that are answered without being asked to: GET_FEATURES, SET_LOG_BASE, GET_VRING_BASE,
/// GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_CONFIG, GET_MAX_MEM_SLOTS.
const ANSWERED: [u32; 7] = [1, SET_LOG_BASE, 11, 15, 17, 24, 36];
const NEED_REPLY: u32 = 8;

/// A socket that leads to `daemon`, and the thread of the relay, which ends with either of them.
///
/// `sees` is called with each message and its descriptor before the daemon gets it; by then all
/// answers to those before it have been passed on.
pub(super) fn relay(
    daemon: UnixStream,
    mut sees: impl FnMut(u32, Option<&File>) + Send + 'static,
) -> (UnixStream, JoinHandle<()>) {
    let (ours, frontend) = UnixStream::pair().unwrap();
    let passes = move || while pass(&frontend, &daemon, &mut sees).is_ok() {};
    (ours, thread::spawn(passes))
}

fn pass(
    mut frontend: &UnixStream,
    mut daemon: &UnixStream,
    sees: &mut impl FnMut(u32, Option<&File>),
) -> Result<()> {
    let mut message = vec![0; 12];
    let (size, file) = frontend.recv_with_fd(&mut message)?;
    if size != message.len() {
        return Err(Error::from(ErrorKind::UnexpectedEof));
    }
    read_body(frontend, &mut message)?;
    let request = word(&message, 0);
    sees(request, file.as_ref());
    let sent = match file {
        Some(file) => daemon.send_with_fd(&message[..], file.as_raw_fd())?,
        None => 0,
    };
    daemon.write_all(&message[sent..])?;
    if ANSWERED.contains(&request) || word(&message, 4) & NEED_REPLY != 0 {
        let mut answer = vec![0; 12];
        daemon.read_exact(&mut answer)?;
        read_body(daemon, &mut answer)?;
        frontend.write_all(&answer)?;
    }
    Ok(())
}

fn read_body(mut from: &UnixStream, message: &mut Vec<u8>) -> Result<()> {
    message.resize(12 + word(message, 8) as usize, 0);
    from.read_exact(&mut message[12..])
}

fn word(message: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(message[at..at + 4].try_into().unwrap())
}
