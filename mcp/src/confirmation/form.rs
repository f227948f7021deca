//! The form in which a client asks its user, and the user's answer in it. Pure.

use std::collections::BTreeMap;

use nido_api::error::{Error, Result};
use rmcp::model::{
    BooleanSchema, ClientCapabilities, ElicitRequest, ElicitRequestParams, ElicitResult, ElicitationAction,
    ElicitationSchema, InputRequest, InputRequiredResult,
};

/// What the form's one field is called, and the request for it.
pub const FIELD: &str = "confirm";

/// Whether this client can show a form to its user.
pub fn shows_forms(client: &ClientCapabilities) -> bool {
    // One without a kind supports forms.
    client.elicitation.as_ref().is_some_and(|can| can.form.is_some() || can.url.is_none())
}

/// The form with this question.
pub fn form(words: &str) -> Result<ElicitRequestParams> {
    let field = BooleanSchema::new().title("Yes, do it").description("Nothing is done unless this is confirmed");
    let schema = ElicitationSchema::builder().required_bool_property(FIELD, |_| field).build();
    let requested_schema = schema.map_err(|e| Error::internal(format!("the form cannot be made: {e}")))?;
    Ok(ElicitRequestParams::FormElicitationParams { meta: None, message: words.into(), requested_schema })
}

/// The same as a result that requests it; the client brings `secret` back with the answer.
pub fn form_result(words: &str, secret: String) -> Result<InputRequiredResult> {
    let request = InputRequest::Elicitation(ElicitRequest::new(form(words)?));
    Ok(InputRequiredResult::new(Some(BTreeMap::from([(FIELD.to_owned(), request)])), Some(secret)))
}

/// A user's answer in a form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FormAnswer {
    Yes,
    No,
    /// The form was closed, or sent without the tick.
    Nothing,
}

/// The answer that the client passes on.
pub fn form_answer(answer: &ElicitResult) -> FormAnswer {
    let yes = answer.content.as_ref().is_some_and(|content| content[FIELD] == true);
    match answer.action {
        ElicitationAction::Accept if yes => FormAnswer::Yes,
        ElicitationAction::Decline => FormAnswer::No,
        _ => FormAnswer::Nothing,
    }
}
