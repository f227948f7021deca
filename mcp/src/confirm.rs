//! A person's word before something is destroyed.
//!
//! ```text
//!  policy says never, or it is the caller's own throw-away VM ───────────────────────────> go, and written down
//!  approval_id, or the answer to a form that was given out ──> used up ───────────────────> go
//!  else an approval is asked for:
//!    a client without `initialize` that shows forms ──> input_required, with a secret as state
//!    one with `initialize` that shows forms ──> elicitation/create ──> used up ───────────> go
//!    any other ──> approval_required: the user runs `nido approve ID`, the model calls again with approval_id
//! ```
//!
//! An approval is bound to the VM's id, the caller, the tool and a digest of the arguments; it is good for two minutes and for
//! one use. Whoever may go on goes on with that id: if the name is another VM's when the core looks, nothing is done.
//!
//! Invariants: what a model can fill in by itself never counts as consent; what cannot be found out is not done.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use nido_vmm::api::{APPROVAL_LIFETIME, Approval, ApprovalState, Ask};
use nido_vmm::error::{Code, Error, Result};
use nido_vmm::name::VmName;
use nido_vmm::nido::random_id;
use nido_vmm::policy::Confirm;
use rmcp::RoleServer;
use rmcp::model::{
    BooleanSchema, ClientCapabilities, ElicitRequest, ElicitRequestParams, ElicitResult, ElicitationAction,
    ElicitationSchema, InputRequest, InputRequiredResult, InputResponses, ProtocolVersion,
};
use rmcp::service::RequestContext;
use serde_json::Value;

use crate::call::Call;
use crate::tools::{Confirmed, Tool};

/// What the form's one field is called, and the request for it.
const FIELD: &str = "confirm";

/// What a retry of a client without sessions brings along.
#[derive(Debug, Default)]
pub struct Retry {
    pub answers: Option<InputResponses>,
    pub state: Option<String>,
}

/// What is decided.
#[derive(Debug)]
pub enum Word {
    /// Go on.
    Go(Leave),
    /// Ask the user first.
    Ask(Box<InputRequiredResult>),
}

/// That it may be done, and to what.
#[derive(Debug, Default)]
pub struct Leave {
    /// Why, for the audit log.
    pub word: &'static str,
    /// The id of the only VM that it may be done to, if that was looked at.
    pub vm: Option<String>,
}

/// Forms that are open. What an answer has to bring back is nowhere to be seen but in the form, so that an approval's id, which
/// is printed for people, is no answer.
#[derive(Debug, Default)]
pub struct Questions(Mutex<HashMap<String, (String, Instant)>>);

impl Questions {
    /// The secret of the form about this approval.
    fn ask(&self, approval: &str) -> Result<String> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, (_, at)| at.elapsed() < APPROVAL_LIFETIME);
        if let Some((secret, _)) = open.get(approval) {
            return Ok(secret.clone());
        }
        let secret = format!("{}{}", random_id()?, random_id()?);
        open.insert(approval.into(), (secret.clone(), Instant::now()));
        Ok(secret)
    }

    /// The approval that the form with this secret is about.
    fn about(&self, secret: &str) -> Option<String> {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.iter().find(|(_, (known, _))| known == secret).map(|(approval, _)| approval.clone())
    }
}

/// Whether it may be done now.
pub async fn confirm(
    call: &Call,
    tool: &Tool,
    arguments: &Value,
    retry: Retry,
    context: &RequestContext<RoleServer>,
) -> Result<Word> {
    if tool.confirmed == Confirmed::No {
        return Ok(Word::Go(Leave::default()));
    }
    if call.app.settings().policy.confirm == Confirm::Never {
        return Ok(Word::Go(Leave { word: "confirm_never", vm: None }));
    }
    let name = arguments.get("name").and_then(Value::as_str).and_then(|name| name.parse::<VmName>().ok());
    // A name that is none is told by the tool itself; nothing can be destroyed then.
    let Some(name) = name else { return Ok(Word::Go(Leave::default())) };
    let nido = call.nido().await?;
    // Also of a name that is nobody's: it may be somebody's a moment later.
    let vm = nido.info(&name).await?;
    let go = |word| Ok(Word::Go(Leave { word, vm: Some(vm.id.clone()) }));
    if tool.confirmed == Confirmed::OfThrowAway && !vm.ephemeral {
        return go("");
    }
    if vm.ephemeral && call.app.made(&call.who.actor, &vm.id) {
        return go("own_ephemeral");
    }
    let ask = Ask {
        tool: tool.name.into(),
        vm_id: vm.id.clone(),
        vm_name: vm.name.clone(),
        actor: call.who.actor.clone(),
        agent: call.who.agent.clone(),
        arguments: arguments.clone(),
    };
    asked(call, tool, &ask, retry, context).await
}

/// The same of what a person has to say yes to.
async fn asked(
    call: &Call,
    tool: &Tool,
    ask: &Ask,
    retry: Retry,
    context: &RequestContext<RoleServer>,
) -> Result<Word> {
    let go = |word| Ok(Word::Go(Leave { word, vm: Some(ask.vm_id.clone()) }));
    if let Some(id) = ask.arguments.get("approval_id").and_then(Value::as_str) {
        use_up(call, id, ask)?;
        return go("approved");
    }
    let shows_forms = context.client_capabilities().is_some_and(|client| shows_forms(&client));
    let by_result = shows_forms && is_modern(context);
    // An answer to a form that nobody knows any more is none: the user is asked again.
    if let (true, Some(answers), Some(secret)) = (by_result, &retry.answers, &retry.state)
        && let Some(id) = call.app.questions().about(secret)
    {
        answered(call, &id, ask, answers)?;
        return go("confirmed");
    }
    let approval = call.nido().await?.approval_ask(ask)?;
    if approval.state != ApprovalState::Pending {
        // The user was quicker than the model.
        use_up(call, &approval.id, ask)?;
        return go("approved");
    }
    let words = question(tool, ask);
    if by_result {
        let secret = call.app.questions().ask(&approval.id)?;
        return Ok(Word::Ask(Box::new(form_result(&words, secret)?)));
    }
    if shows_forms {
        elicited(call, context, &words, &approval, ask).await?;
        return go("confirmed");
    }
    Err(by_hand(call, &approval, ask))
}

/// Whether a request stands for itself, in the protocol without `initialize`.
pub fn is_modern(context: &RequestContext<RoleServer>) -> bool {
    context.protocol_version().is_some_and(|version| version.as_str() >= ProtocolVersion::V_2026_07_28.as_str())
}

/// What a person is asked. Names are parsed names, so nothing of a guest is in it.
fn question(tool: &Tool, ask: &Ask) -> String {
    let agent = ask.agent.as_deref().map_or_else(|| "An agent".into(), crate::answer::plain);
    let what = match tool.name {
        "vm_restore" => "take back to a snapshot, losing what it has done since,",
        "vm_stop" => "stop, and so destroy with its disk, because it is a throw-away VM,",
        _ => "delete, with its disk and its snapshots,",
    };
    format!("{agent} wants to {what} the VM '{}' (id {}). This cannot be undone.", ask.vm_name, ask.vm_id)
}

fn shows_forms(client: &ClientCapabilities) -> bool {
    // One that says nothing about the kind means forms.
    client.elicitation.as_ref().is_some_and(|can| can.form.is_some() || can.url.is_none())
}

fn form(words: &str) -> Result<ElicitRequestParams> {
    let field = BooleanSchema::new().title("Yes, do it").description("Without a yes, nothing is done");
    let schema = ElicitationSchema::builder().required_bool_property(FIELD, |_| field).build();
    let requested_schema = schema.map_err(|e| Error::internal(format!("the form cannot be made: {e}")))?;
    Ok(ElicitRequestParams::FormElicitationParams { meta: None, message: words.into(), requested_schema })
}

fn form_result(words: &str, secret: String) -> Result<InputRequiredResult> {
    let request = InputRequest::Elicitation(ElicitRequest::new(form(words)?));
    Ok(InputRequiredResult::new(Some(BTreeMap::from([(FIELD.to_owned(), request)])), Some(secret)))
}

/// What came back from a client that was asked by a result.
fn answered(call: &Call, id: &str, ask: &Ask, answers: &InputResponses) -> Result<()> {
    let answer: Option<ElicitResult> =
        answers.get(FIELD).and_then(|answer| serde_json::from_value(answer.clone()).ok());
    let answer = answer.ok_or_else(|| Error::new(Code::ApprovalRequired, "the answer to the question is missing"))?;
    decided(call, id, ask, &answer)
}

/// Asks a client with a session, and waits for the person.
async fn elicited(
    call: &Call,
    context: &RequestContext<RoleServer>,
    words: &str,
    approval: &Approval,
    ask: &Ask,
) -> Result<()> {
    let asked = context.peer.create_elicitation_with_timeout(form(words)?, Some(APPROVAL_LIFETIME));
    let answer = call.unless_cancelled(async { Ok(asked.await) }).await?;
    match answer {
        Ok(answer) => decided(call, &approval.id, ask, &answer),
        // It says that it can ask, and cannot: the user can still say yes by hand.
        Err(error) => {
            tracing::warn!("the client could not ask its user: {error}");
            Err(by_hand(call, approval, ask))
        }
    }
}

/// A person has decided; the word is used up at once.
fn decided(call: &Call, id: &str, ask: &Ask, answer: &ElicitResult) -> Result<()> {
    let nido = Arc::clone(call.app.unsettled());
    let yes = answer.content.as_ref().is_some_and(|content| content[FIELD] == true);
    let agent = call.who.agent.as_deref().map_or_else(|| "a client".into(), crate::answer::plain);
    let by = format!("{} through {agent}", call.who.actor);
    match answer.action {
        ElicitationAction::Accept if yes => {
            // Whose it is, and for what, is looked at before anything is decided.
            if nido.approval(id)?.actor != ask.actor {
                return Err(Error::new(Code::Denied, "that approval is for another caller"));
            }
            nido.approve(id, &by)?;
            use_up(call, id, ask)
        }
        _ => {
            if nido.approval(id)?.actor == ask.actor {
                nido.deny(id, &by)?;
            }
            Err(refused(call))
        }
    }
}

/// Uses an approval up. What is denied here a person can still decide, so it is told differently from what the server forbids.
fn use_up(call: &Call, id: &str, ask: &Ask) -> Result<()> {
    let nido = call.app.unsettled();
    nido.approval_use(id, ask).map_err(|error| {
        if error.code() != Code::Denied {
            return error;
        }
        match nido.approval(id) {
            Ok(approval) if said_no(&approval, ask) => refused(call),
            _ => {
                call.next_step("call again without approval_id, so that the user is asked about exactly this");
                error
            }
        }
    })
}

/// Whether this caller has had a no about this VM. Pure.
fn said_no(approval: &Approval, ask: &Ask) -> bool {
    approval.state == ApprovalState::Denied && (&approval.actor, &approval.vm_id) == (&ask.actor, &ask.vm_id)
}

/// What a model is told when a person has said no: just now, or a while ago.
fn refused(call: &Call) -> Error {
    call.next_step("the user has refused: do not try it again, nor in another way, unless they ask for it");
    Error::new(Code::Denied, "the user said no").hint("ask the user what to do instead")
}

/// For clients that cannot ask their user.
fn by_hand(call: &Call, approval: &Approval, ask: &Ask) -> Error {
    call.needs_approval(&approval.id);
    let words = format!("a person has to approve this for VM '{}' first", ask.vm_name);
    Error::new(Code::ApprovalRequired, words).hint(format!(
        "ask the user to run, within two minutes: nido approve {id}; then call again with the same arguments and approval_id \
         {id}",
        id = approval.id
    ))
}
