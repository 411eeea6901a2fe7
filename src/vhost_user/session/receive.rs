//! What a daemon asks and says by itself, taken and answered.

use std::io;
use std::os::fd::BorrowedFd;

use super::VhostUserSession;
use super::channel::{Channel, failed};
use super::error::Result;
#[cfg(doc)]
use super::error::SessionError;
use super::message::SessionMessage;

impl VhostUserSession {
    /// The channel for what the daemon asks and says by itself, to be polled for
    /// [`receive`](Self::receive). It is another one after a reconnection; `None` for a daemon
    /// that has none, and without [`SessionOptions::with_backend_channel`].
    ///
    /// [`SessionOptions::with_backend_channel`]: crate::SessionOptions::with_backend_channel
    pub fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.channel.as_ref().map(|channel| channel.socket())
    }

    /// What the daemon has asked or said by itself, if there is something: that its
    /// configuration space has changed ([`SessionMessage::is_config_change`]), or another request,
    /// which is the caller's business. If it [waits for an answer](SessionMessage::is_asking),
    /// that is to come soon: most daemons do nothing else until then, and a call of the session
    /// that waits for them would wait in vain. Changes of the configuration are answered already.
    ///
    /// ```
    /// use guest_memory_shm::{SessionOptions, VhostUserSession};
    /// # use guest_memory_shm::mock::MockDaemon;
    /// # let daemon = MockDaemon::builder().with_backend_channel().start_unnamed()?;
    /// # let socket = daemon.connect()?;
    ///
    /// let options = SessionOptions::new(0).with_backend_channel();
    /// let mut session = VhostUserSession::on_socket(socket, options)?;
    /// # daemon.notify_config_change()?;
    /// // When session.channel() is readable:
    /// while let Some(message) = session.receive()? {
    ///     match message.is_config_change() {
    ///         true => println!("{:?}", session.config(0, 8)?),
    ///         false if message.is_asking() => session.answer(message, 1)?, // no
    ///         false => {}
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`SessionError::Channel`]: the daemon hung up there, or sent what is no request. The
    /// channel has ended then, and the session has not.
    pub fn receive(&mut self) -> Result<Option<SessionMessage>> {
        self.on_channel(Channel::next).map(Option::flatten)
    }

    /// Answers what the daemon asked; 0 is yes. Does nothing if it does not wait for that, or the
    /// channel is another one by now.
    ///
    /// # Errors
    ///
    /// [`SessionError::Channel`], as for [`receive`](Self::receive).
    pub fn answer(&mut self, message: SessionMessage, value: u64) -> Result<()> {
        let number = self.channel.as_ref().map(Channel::number);
        if message.asked_on.is_none() || message.asked_on != number {
            return Ok(());
        }
        let answer = |channel: &mut Channel| channel.answer(message.code(), value);
        self.on_channel(answer).map(drop)
    }

    fn on_channel<T>(
        &mut self,
        work: impl FnOnce(&mut Channel) -> io::Result<T>,
    ) -> Result<Option<T>> {
        let done = self.channel.as_mut().map(work).transpose();
        done.map_err(|error| {
            self.channel = None;
            failed(error)
        })
    }
}
