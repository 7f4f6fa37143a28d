"""The prediction flow: the classes of any number of images, by a registered model, as a table."""

from prefect import flow

from tasks.predict import Predictions, predict


@flow(name="predict", flow_run_name="{model}", persist_result=False)
def predict_flow(model: str, inputs: list[str], out: str) -> Predictions:
    """Predict the class of every image among the inputs; for the arguments see `tasks.predict.predict`."""
    return predict(model, inputs, out)
