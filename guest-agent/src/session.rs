//! One session: hello first, then one request after another until the host closes.
//!
//! Invariant: nothing is done for a host that has not shown the VM's token, and a host that breaks the protocol is
//! notified and loses the session, never the agent.

use std::sync::Arc;
use std::time::Duration;

use nido_guest_agent::wire::{
    self, Fault, Hello, Pong, Power, Refusal as Reason, Refused, ToGuest, ToHost, VERSION, VERSION_OLDEST, Welcome,
    feature,
};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use crate::access::{Access, SessionAdmission, SessionId};
use crate::agent::{Agent, Slot, TunnelPlace};
use crate::framing::{FrameError, FrameReader, FrameWriter, Incoming};
use crate::mux_stream::{Sink, Source};
use crate::refusal::Refusal;
use crate::role::Role;
use crate::{exec, files, forward, identity_reset, nested, network, process_limit, warnings};

/// How long the host may take for its hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);
/// How long what a refused host still sends is read and dropped, so that the refusal reaches it.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// How long the host may take to close the session after the reply that the guest powers off.
const SESSION_CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// The most of a failure's text in the reply to a bootstrap request, in bytes.
const BOOTSTRAP_ERROR_BYTES_MAX: usize = 2048;
/// How long writing everything to the disks may take before the guest goes down.
const SYNC_DEADLINE: Duration = Duration::from_secs(20);

/// Serves one session to its end.
pub async fn serve(agent: Arc<Agent>, (source, sink): (Source, Sink)) {
    let (mut input, mut output) = (FrameReader::new(source), FrameWriter::new(sink));
    let guard = agent.open_session();
    let busy = guard.is_none();
    let mut pass = match timeout(HELLO_DEADLINE, greet(&agent, busy, &mut input, &mut output)).await {
        Ok(Ok(Some(pass))) => pass,
        Ok(Ok(None)) => return drain(input, output).await,
        Ok(Err(_gone)) => return,
        Err(_late) => return,
    };
    input.lift_greeting_limit();
    let number = pass.number;
    tokio::select! {
        biased;
        // The stream is dropped, and with it all that runs for this session.
        () = pass.revoked() => {}
        () = serve_admitted(&agent, number, input, output) => {}
    }
}

async fn serve_admitted(agent: &Arc<Agent>, number: SessionId, input: FrameReader, output: FrameWriter) {
    match answer_requests(agent, number, input, output).await {
        SessionEnd::Closed => {}
        SessionEnd::Broken(input, output) => drain(input, output).await,
        SessionEnd::Forwards(input, output, target, place) => forward::copy(input, output, target, &place).await,
    }
}

/// What a host may send to this agent beyond the first release of the protocol version.
const FEATURES: u32 = feature::HOLES | feature::LINKS | feature::OWNERS;

/// How a session's requests came to an end.
enum SessionEnd {
    /// The host has closed it, or it broke.
    Closed,
    /// `Failed` was sent to the host, which may still be sending.
    Broken(FrameReader, FrameWriter),
    /// It has become the two ends of a connection.
    Forwards(FrameReader, FrameWriter, tokio::net::TcpStream, TunnelPlace),
}

/// Reads the hello and replies. Returns nothing if the host was refused.
async fn greet(
    agent: &Agent,
    busy: bool,
    input: &mut FrameReader,
    output: &mut FrameWriter,
) -> Result<Option<SessionAdmission>, FrameError> {
    let answer = match input.next().await {
        Ok(Some(Incoming::Message(ToGuest::Hello(hello)))) => {
            judge(&hello, &agent.access, busy).map(|pass| (pass, welcome(&hello)))
        }
        Ok(None) | Err(FrameError::Io(_)) => return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
        Ok(Some(_)) | Err(FrameError::Wire(_)) => Err(Reason::NoHello),
    };
    match answer {
        Ok((pass, welcome)) => {
            output.send(&welcome).await?;
            Ok(Some(pass))
        }
        Err(reason) => {
            output.send(&refused(reason)).await?;
            Ok(None)
        }
    }
}

/// Whether a hello opens the session. The token comes first: who does not have it learns nothing else.
fn judge(hello: &Hello, access: &Access, busy: bool) -> Result<SessionAdmission, Reason> {
    let pass = access.admit(&hello.token).ok_or(Reason::Token)?;
    spoken(hello).ok_or(Reason::Version)?;
    if busy { Err(Reason::Busy) } else { Ok(pass) }
}

/// The protocol version of a session that begins with this hello.
fn spoken(hello: &Hello) -> Option<u16> {
    wire::common_version((VERSION_OLDEST, VERSION), (hello.oldest, hello.newest))
}

/// Carries out a bootstrap request: a hello and an identity reset. Returns the messages that a session would have sent, as one piece.
///
/// It is the first thing that runs in a guest that was loaded, where everything that runs for the first time is dear; hence
/// no session, no stream and no timer. A host that disconnects meanwhile does not stop it: the next one learns which token is valid.
pub async fn answer_bootstrap_request(agent: &Arc<Agent>, bootstrap_request: &[u8]) -> Vec<u8> {
    let (first, second) = match wire::decode_first(bootstrap_request) {
        Ok((ToGuest::Hello(hello), rest)) => {
            (judge(&hello, &agent.access, false).map(|pass| (pass, welcome(&hello))), rest)
        }
        _ => (Err(Reason::NoHello), &[][..]),
    };
    let (pass, welcome) = match first {
        Ok(admitted) => admitted,
        Err(reason) => return encoded(&[refused(reason)]),
    };
    let answer = match wire::decode_first(second) {
        Ok((ToGuest::ResetIdentity(order), [])) => identity_reset::reset_identity(agent, order, pass.number).await,
        _ => Err(Refusal::new(
            Fault::Invalid,
            "a bootstrap request contains a hello and an identity reset, and nothing else",
        )),
    };
    let answer = match answer {
        Ok(()) => ToHost::IdentityReset(pong(agent)),
        Err(Refusal { fault, mut message }) => {
            message.truncate(message.floor_char_boundary(BOOTSTRAP_ERROR_BYTES_MAX));
            ToHost::Failed(wire::Failed { fault, message })
        }
    };
    encoded(&[welcome, answer])
}

fn encoded(messages: &[ToHost]) -> Vec<u8> {
    // What was refused is short enough for a frame, and so is the rest.
    messages.iter().flat_map(|message| wire::encode(message).unwrap_or_default()).collect()
}

fn welcome(hello: &Hello) -> ToHost {
    ToHost::Welcome(Welcome {
        version: spoken(hello).unwrap_or(VERSION),
        nonce: hello.nonce,
        agent: env!("CARGO_PKG_VERSION").into(),
        features: Some(FEATURES),
    })
}

fn refused(reason: Reason) -> ToHost {
    ToHost::Refused(Refused { reason, oldest: VERSION_OLDEST, newest: VERSION })
}

async fn answer_requests(
    agent: &Arc<Agent>,
    number: SessionId,
    mut input: FrameReader,
    mut output: FrameWriter,
) -> SessionEnd {
    loop {
        let request = match input.next().await {
            Ok(Some(Incoming::Message(request))) => request,
            // Input of a command that ended or was never started may still be under way.
            Ok(Some(Incoming::Raw(wire::kind::STDIN, _))) => continue,
            Ok(Some(Incoming::Raw(kind, _))) => {
                return broken(input, output, &format!("frame kind {kind:#04x} outside of a request")).await;
            }
            Ok(None) | Err(FrameError::Io(_)) => return SessionEnd::Closed,
            Err(FrameError::Wire(error)) => return broken(input, output, &error.to_string()).await,
        };
        if matches!(request, ToGuest::Put(_) | ToGuest::Get(_) | ToGuest::Connect(_)) {
            agent.takes_memory();
        }
        let place = match place(agent, &request, &mut input).await {
            Ok(place) => place,
            Err(BusyError) => {
                let told = output.send(&refused(Reason::Busy)).await;
                return if told.is_ok() { SessionEnd::Broken(input, output) } else { SessionEnd::Closed };
            }
        };
        let done = match request {
            ToGuest::Ping => answer(&mut output, Ok(ToHost::Pong(pong(agent)))).await,
            ToGuest::Exec(exec) => exec::run(agent, exec, &mut input, &mut output).await,
            ToGuest::Put(put) => match files::receive(put, &mut input, &mut output).await {
                Ok(files::ReceiveOutcome::Done) => Ok(()),
                Ok(files::ReceiveOutcome::Failed) => return SessionEnd::Broken(input, output),
                Err(error) => Err(error),
            },
            ToGuest::Get(get) => files::send(get, &mut output).await,
            ToGuest::Connect(connect) => match (forward::connect(&connect).await, place) {
                (Ok(target), Some(Slot::Tunnel(place))) => match output.send(&ToHost::Connected).await {
                    Ok(()) => return SessionEnd::Forwards(input, output, target, place),
                    Err(error) => Err(error.into()),
                },
                (Ok(_), _) => Err(std::io::Error::other("a connection beyond the limit").into()),
                (Err(refusal), _) => fail(&mut output, refusal).await,
            },
            ToGuest::Power(power) => go_down(agent, power, &mut input, &mut output).await,
            ToGuest::Freeze => {
                let frozen = match can_be_saved() {
                    Ok(()) => {
                        identity_reset::prepare(agent);
                        agent.freezer.freeze().await
                    }
                    refused => refused,
                };
                answer(&mut output, frozen.map(|()| ToHost::Frozen)).await
            }
            ToGuest::Thaw => answer(&mut output, agent.freezer.thaw().await.map(|()| ToHost::Thawed)).await,
            ToGuest::ResetIdentity(order) => {
                let reply = identity_reset::reset_identity(agent, order, number).await;
                answer(&mut output, reply.map(|()| ToHost::IdentityReset(pong(agent)))).await
            }
            ToGuest::SetClock(time_ns) => {
                answer(&mut output, identity_reset::correct_clock(agent, time_ns).map(|()| ToHost::ClockSet)).await
            }
            ToGuest::LimitProcesses(limit) => answer(&mut output, limit_processes(agent, limit)).await,
            ToGuest::StdinEof | ToGuest::Signal(_) | ToGuest::Resize(_) => Ok(()),
            ToGuest::Hello(_) | ToGuest::Entry(_) | ToGuest::EntryEnd | ToGuest::TreeEnd | ToGuest::Hole(_) => {
                return broken(input, output, "a message that belongs to no request").await;
            }
        };
        match done {
            Ok(()) => {}
            Err(FrameError::Io(_)) => return SessionEnd::Closed,
            Err(FrameError::Wire(error)) => return broken(input, output, &error.to_string()).await,
        }
    }
}

/// There are too many of this kind.
struct BusyError;

/// The place that a request takes, if it takes one. A host that goes while its request waits takes that along.
async fn place(agent: &Agent, request: &ToGuest, input: &mut FrameReader) -> Result<Option<Slot>, BusyError> {
    match request {
        ToGuest::Exec(_) | ToGuest::Put(_) | ToGuest::Get(_) => tokio::select! {
            biased;
            place = agent.work_place() => place.map(Some).ok_or(BusyError),
            () = input.closed() => Err(BusyError),
        },
        ToGuest::Connect(_) => agent.tunnel_place().map(Some).ok_or(BusyError),
        _ => Ok(None),
    }
}

/// A machine inside this one holds state in the processor that no saved memory has.
fn can_be_saved() -> Result<(), Refusal> {
    match nested::machines() {
        0 => Ok(()),
        count => Err(Refusal::new(
            Fault::Busy,
            format!(
                "{count} virtual machines or users of KVM run inside it, and cannot be saved along with it: end them first"
            ),
        )),
    }
}

/// Sends the result of a request to the host.
async fn answer(output: &mut FrameWriter, result: Result<ToHost, Refusal>) -> Result<(), FrameError> {
    match result {
        Ok(message) => Ok(output.send(&message).await?),
        Err(refusal) => fail(output, refusal).await,
    }
}

/// Reports to the host that its request was not carried out.
async fn fail(output: &mut FrameWriter, Refusal { fault, message }: Refusal) -> Result<(), FrameError> {
    Ok(output.send(&ToHost::Failed(wire::Failed { fault, message })).await?)
}

async fn broken(input: FrameReader, mut output: FrameWriter, message: &str) -> SessionEnd {
    match fail(&mut output, Refusal::new(Fault::Invalid, message)).await {
        Ok(()) => SessionEnd::Broken(input, output),
        Err(_gone) => SessionEnd::Closed,
    }
}

/// Closes our side and drops what still comes, so that the last reply is not lost to a reset.
async fn drain(mut input: FrameReader, mut output: FrameWriter) {
    output.close().await;
    let mut bin = vec![0; 64 * 1024];
    let to_end = async { while matches!(input.read(&mut bin).await, Ok(1..)) {} };
    // Late or not, the session is over.
    let _ = timeout(DRAIN_DEADLINE, to_end).await;
}

/// Puts the limit of processes in force, and reports what it has refused.
fn limit_processes(agent: &Agent, limit: u32) -> Result<ToHost, Refusal> {
    if limit < process_limit::MIN {
        return Err(Refusal::new(
            Fault::Invalid,
            format!("the limit of processes is less than {}", process_limit::MIN),
        ));
    }
    let Some(processes) = agent.scopes.process_limit() else {
        return Err(Refusal::new(Fault::Other, "this agent does not limit processes: it does not own its machine"));
    };
    processes.set(limit).map_err(|error| Refusal::from_io("the limit of processes", &error))?;
    Ok(ToHost::ProcessesRefused(processes.refused()))
}

fn pong(agent: &Agent) -> Pong {
    let uptime = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let uptime_ms = uptime.tv_sec.cast_unsigned() * 1000 + uptime.tv_nsec.cast_unsigned() / 1_000_000;
    Pong {
        agent: env!("CARGO_PKG_VERSION").into(),
        uptime_ms,
        sessions: u32::try_from(agent.sessions()).unwrap_or(u32::MAX),
        is_init: agent.role == Role::Init,
        address: network::address().map(|address| address.to_string()),
        warnings: Some(warnings::all()).filter(|list| !list.is_empty()),
    }
}

async fn go_down(
    agent: &Agent,
    power: Power,
    input: &mut FrameReader,
    output: &mut FrameWriter,
) -> Result<(), FrameError> {
    if let Err(refusal) = agent.freezer.thaw().await {
        return fail(output, refusal).await;
    }
    let synced = tokio::task::spawn_blocking(rustix::fs::sync);
    if timeout(SYNC_DEADLINE, synced).await.is_err() {
        return fail(output, Refusal::new(Fault::Other, "the disks could not be synced in time")).await;
    }
    output.send(&ToHost::PoweringOff).await?;
    output.close().await;
    // The host closes when it has read the reply; only then is it sure to have arrived.
    let _ = timeout(SESSION_CLOSE_TIMEOUT, input.next()).await;
    // A second request while the first is carried out changes nothing.
    let _ = agent.power.try_send(power);
    Err(std::io::Error::from(std::io::ErrorKind::ConnectionAborted).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(token: &[u8], oldest: u16, newest: u16) -> Hello {
        Hello { oldest, newest, token: token.to_vec().into(), nonce: 7 }
    }

    #[test]
    fn the_token_is_judged_before_anything_else() {
        let access = Access::new(b"right".to_vec());
        let judged = |token, oldest, newest, busy| judge(&hello(token, oldest, newest), &access, busy).err();
        assert_eq!(judged(b"right", VERSION, VERSION, false), None);
        assert_eq!(judged(b"right", 0, 9, false), None);
        assert_eq!(judged(b"wrong", 8, 9, true), Some(Reason::Token));
        assert_eq!(judged(b"", 0, 9, false), Some(Reason::Token));
        assert_eq!(judged(b"right", VERSION + 1, VERSION + 2, false), Some(Reason::Version));
        assert_eq!(judged(b"right", 0, 9, true), Some(Reason::Busy));
    }

    #[test]
    fn a_session_speaks_the_newest_version_that_both_ends_know() {
        for (newest, spoken) in [(VERSION, VERSION), (VERSION + 9, VERSION)] {
            let ToHost::Welcome(welcome) = welcome(&hello(b"", 0, newest)) else { panic!("no welcome") };
            assert_eq!((welcome.version, welcome.nonce), (spoken, 7));
        }
    }
}
