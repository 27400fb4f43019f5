//! The caller's end of a generation: async streams over what the scheduler tells. Dropping one cancels its request.

use std::pin::Pin;
use std::sync::mpsc::Sender;
use std::task::{Context, Poll};

use futures::Stream;
use tokio::sync::mpsc::UnboundedReceiver;

use super::scheduler::{Finish, GeneratedToken, GenerationEvent, Message};
use crate::backend::SequenceId;
use crate::error::{Error, Result};

/// Events of one generation: [`GenerationEvent::Prefilled`], the tokens, [`GenerationEvent::Finished`], or an error at
/// any point; nothing after the last two. Dropping it before stops the work in every stage and frees its KV.
#[derive(Debug)]
pub struct GenerationStream {
    id: SequenceId,
    events: Source,
    scheduler: Sender<Message>,
}

#[derive(Debug)]
enum Source {
    /// The request was refused before it reached the scheduler.
    Refused(Option<Error>),
    /// Events arrive.
    Live(UnboundedReceiver<Result<GenerationEvent>>),
    /// Finished or failed.
    Ended,
}

impl GenerationStream {
    pub(super) fn live(
        id: SequenceId,
        events: UnboundedReceiver<Result<GenerationEvent>>,
        scheduler: Sender<Message>,
    ) -> Self {
        GenerationStream { id, events: Source::Live(events), scheduler }
    }

    pub(super) fn refused(error: Error, scheduler: Sender<Message>) -> Self {
        GenerationStream { id: SequenceId(u64::MAX), events: Source::Refused(Some(error)), scheduler }
    }
}

impl Stream for GenerationStream {
    type Item = Result<GenerationEvent>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = match &mut self.events {
            Source::Ended => None,
            Source::Refused(error) => error.take().map(Err),
            Source::Live(events) => match events.poll_recv(cx) {
                Poll::Pending => return Poll::Pending,
                // The scheduler ends every request; if it vanished without, the executor is gone.
                Poll::Ready(item) => Some(item.unwrap_or(Err(Error::Stopped))),
            },
        };
        if matches!(item, None | Some(Err(_) | Ok(GenerationEvent::Finished(_)))) {
            self.events = Source::Ended;
        }
        Poll::Ready(item)
    }
}

impl Drop for GenerationStream {
    fn drop(&mut self) {
        if matches!(self.events, Source::Live(_)) {
            let _ = self.scheduler.send(Message::Cancel(self.id));
        }
    }
}

/// The generated token ids of one request, as they come.
#[derive(Debug)]
pub struct TokenStream(pub(super) GenerationStream);

impl Stream for TokenStream {
    type Item = Result<u32>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            return match Pin::new(&mut self.0).poll_next(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Some(Ok(GenerationEvent::Token(GeneratedToken { id, .. })))) => Poll::Ready(Some(Ok(id))),
                Poll::Ready(Some(Ok(GenerationEvent::Prefilled { .. }))) => continue,
                Poll::Ready(Some(Ok(GenerationEvent::Finished(_))) | None) => Poll::Ready(None),
                Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error))),
            };
        }
    }
}

/// The generated text of one request, in pieces that are whole characters.
#[derive(Debug)]
pub struct TextStream(pub(super) GenerationStream);

impl Stream for TextStream {
    type Item = Result<String>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let text = match Pin::new(&mut self.0).poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(Some(Ok(GenerationEvent::Prefilled { .. }))) => continue,
                Poll::Ready(Some(Ok(GenerationEvent::Token(token)))) => token.text,
                Poll::Ready(Some(Ok(GenerationEvent::Finished(Finish { text, .. })))) => text,
            };
            if !text.is_empty() {
                return Poll::Ready(Some(Ok(text)));
            }
        }
    }
}
