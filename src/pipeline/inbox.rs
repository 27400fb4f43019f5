//! The queue into a stage: an [`Outlet`], held by the stage before it or by the scheduler, and the stage's [`Inbox`].
//!
//! Within a process a message is moved, and a tensor in device memory travels beside it. With
//! [`LinkOptions::as_bytes`](super::link::LinkOptions::as_bytes) message and activations are one run of bytes, as between
//! machines: a remote link writes those to a connection instead of the queue, and a thread at the other end puts what it
//! reads into the stage's inbox.

use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Instant;

use candle_core::Tensor;

use super::link::{Activations, Link, WireRows};
use super::message::{StageMessage, from_bytes, to_bytes};
use crate::error::{Error, Result};

/// The way into a stage.
pub struct Outlet {
    queue: SyncSender<Parcel>,
    /// The way that activations take; `None` into the first stage, which gets none.
    link: Option<Link>,
    as_bytes: bool,
}

/// A stage's end of the queue.
pub struct Inbox(Receiver<Parcel>);

/// A message on its way, with the times that its own process adds.
pub struct Parcel {
    body: Body,
    sent: Instant,
    due: Option<Instant>,
}

enum Body {
    Moved(StageMessage, Option<Activations>),
    Bytes(Vec<u8>),
}

/// Activations that have left their stage, and when a simulated link has brought them to the next one.
pub struct Departed {
    activations: Activations,
    due: Option<Instant>,
}

/// A message that has arrived.
pub struct Delivery {
    /// The message.
    pub message: StageMessage,
    /// The previous stage's output, with a step.
    pub activations: Option<Activations>,
    /// When it was sent, on the receiver's clock. From another machine: when it was read.
    pub sent: Instant,
}

/// A queue of at most `messages`: a stage that falls behind holds up the one before. The first stage has no `link`.
pub fn inbox(messages: usize, link: Option<Link>, as_bytes: bool) -> (Outlet, Inbox) {
    let (queue, receiver) = std::sync::mpsc::sync_channel(messages);
    (Outlet { queue, link, as_bytes }, Inbox(receiver))
}

impl Outlet {
    /// Takes a stage's output, (rows, hidden_size), off its device. Blocks while it is copied, not while a simulated link
    /// has it.
    pub fn depart(&self, output: Tensor) -> Result<Departed> {
        let Some(link) = &self.link else {
            return Err(Error::Tensors("activations on the way into the first stage, which takes tokens".into()));
        };
        let (activations, due) = link.depart(output)?;
        Ok(Departed { activations, due })
    }

    /// Queues a message, and with a step the activations that go with it. Blocks while the inbox is full. `sent` is when
    /// the sender was done with it.
    ///
    /// A closed inbox is no error: its stage has died, and said so in a reply of its own, or everything is being shut down.
    pub fn send(&self, message: StageMessage, departed: Option<Departed>, sent: Instant) -> Result<()> {
        let (activations, due) = departed.map_or((None, None), |departed| (Some(departed.activations), departed.due));
        let body = match self.as_bytes {
            false => Body::Moved(message, activations),
            true => {
                let rows = activations.map(Activations::into_rows).transpose()?;
                Body::Bytes(to_bytes::<(StageMessage, Option<WireRows>)>(&(message, rows))?)
            }
        };
        let _ = self.queue.send(Parcel { body, sent, due });
        Ok(())
    }
}

impl Inbox {
    /// Waits for the next parcel; `None` when the sender is gone.
    pub fn recv(&self) -> Option<Parcel> {
        self.0.recv().ok()
    }
}

impl Parcel {
    /// Waits for as long as a simulated link takes, and unpacks. Nothing behind the parcel is there before it either: a
    /// link delivers in order.
    pub fn open(self) -> Result<Delivery> {
        let Parcel { body, sent, due } = self;
        if let Some(due) = due {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        let (message, activations) = match body {
            Body::Moved(message, activations) => (message, activations),
            Body::Bytes(bytes) => {
                let (message, rows): (StageMessage, Option<WireRows>) = from_bytes(&bytes)?;
                (message, rows.map(Activations::Rows))
            }
        };
        Ok(Delivery { message, activations, sent })
    }
}
